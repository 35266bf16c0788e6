"""The timeline of a few rounds: plain decoding, a draft model that takes turns with the target, and saguaro."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.illustrations.canvas import DRAFT, MISS, QUIET, TARGET, new_figure, save
from vllm_saguaro.benchmark.records import Engine, Report, Workload
from vllm_saguaro.benchmark.summary import Summary, summarise

_WORKLOAD = Workload(1, 0.0)
_SHOWN = 6
"""Rounds of saguaro; the others show as many as begin in the same time."""


@dataclass(frozen=True)
class Pass:
    """What was measured of one way to decode. Times in milliseconds; `drafting` is None where nothing is drafted.

    `drafting`: of `draft_model` what the target waits for, of saguaro a whole draft round, on its own cores.
    """

    step: float
    tokens_per_round: float
    tokens_per_second: float
    drafting: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Measured:
    """All three, with K drafts a round."""

    k: int
    plain: Pass
    draft_model: Pass
    saguaro: Pass


def measured(report: Report, k: int) -> Measured:
    """What a report has of batch 1 at temperature 0. Raises ValueError where it lacks one of the three."""
    summaries = summarise(report.runs)
    found: dict[str, Pass] = {}
    for run in report.runs:
        if run.workload == _WORKLOAD and run.engine.k in (0, k) and run.engine.mode not in found:
            found[run.engine.mode] = _pass(run.engine, summaries[run.name])
    missing = [mode for mode in ("plain", "draft_model", "saguaro") if mode not in found]
    if missing:
        raise ValueError(f"the report has no {' and no '.join(missing)} at {_WORKLOAD.name} with K={k}")
    return Measured(k, found["plain"], found["draft_model"], found["saguaro"])


def _pass(engine: Engine, summary: Summary) -> Pass:
    drafting = summary.draft_round_seconds if engine.mode == "saguaro" else summary.drafting_seconds
    return Pass(
        step=1e3 * summary.step_seconds,
        tokens_per_round=summary.tokens_per_round,
        tokens_per_second=summary.tokens_per_second.median,
        drafting=None if drafting is None else 1e3 * drafting,
        hit_rate=summary.hit_rate,
    )


def depths_by(milliseconds: float, draft_round: float, k: int) -> int:
    """Depths of a table that are there so long after its round began, 0 to `k`.

    The draft round is divided evenly: one part to read the outcome and to choose, and one for each of the K steps.
    """
    return min(k, max(0, int(milliseconds / (draft_round / (k + 1)) + 1e-9) - 1))


def draw_rounds(times: Measured, path: Path) -> Path:
    """Four lanes over one axis of milliseconds."""
    figure, axes = new_figure(10.5, 4.4)
    end = _SHOWN * times.saguaro.step
    lanes = {"plain": 3.6, "draft_model": 2.4, "saguaro: target": 1.1, "saguaro: draft": 0.0}
    _draw_plain(axes, lanes["plain"], times.plain, end)
    _draw_turns(axes, lanes["draft_model"], times.draft_model, times.k, end)
    _draw_saguaro(axes, lanes["saguaro: target"], lanes["saguaro: draft"], times)
    for name, each in (("plain", times.plain), ("draft_model", times.draft_model), ("saguaro: target", times.saguaro)):
        text = f"{each.tokens_per_round:.2f} tokens a round\n{each.tokens_per_second:.0f} tokens/s"
        axes.text(1.02 * end, lanes[name], text, va="center", fontsize=8)
    axes.set_yticks(list(lanes.values()), list(lanes))
    axes.set_xlim(-0.3, 1.22 * end)
    axes.set_ylim(-0.8, 4.0)
    axes.set_xlabel("milliseconds")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return save(figure, path)


def _draw_plain(axes: Any, lane: float, plain: Pass, end: float) -> None:
    for number in range(int(end // plain.step)):
        _block(axes, number * plain.step, plain.step, lane, TARGET, "1 token")


def _draw_turns(axes: Any, lane: float, draft_model: Pass, k: int, end: float) -> None:
    assert draft_model.drafting is not None
    for number in range(int(end // draft_model.step)):
        at = number * draft_model.step
        _block(axes, at, draft_model.drafting, lane, DRAFT, f"draft {k}")
        verify = draft_model.step - draft_model.drafting
        _block(axes, at + draft_model.drafting, verify, lane, TARGET, f"verify {k} + 1")


def _draw_saguaro(axes: Any, target: float, draft: float, times: Measured) -> None:
    """Every round's drafts are those that the draft side had finished when the outcome came."""
    step, draft_round = times.saguaro.step, times.saguaro.drafting
    assert draft_round is not None
    part = draft_round / (times.k + 1)
    depths = depths_by(step, draft_round, times.k)
    missed = _missed_rounds(times.saguaro.hit_rate or 0.0)
    for number in range(_SHOWN):
        at = number * step
        if number in missed:
            _block(axes, at, step, target, TARGET, "missed: 1,\nor a backup")
        else:
            _block(axes, at, step, target, TARGET, f"verify {depths} + 1")
        for piece in range(times.k + 1):
            began = at + piece * part
            if began < at + step:
                length = min(part, at + step - began)
                late = piece > depths
                colour = "white" if late else DRAFT if piece else QUIET
                _block(axes, began, length, draft, colour, "late" if late else str(piece) if piece else "N?")
        colour = MISS if number + 1 in missed else "black"
        if number + 1 < _SHOWN:
            _arrow(axes, (at + step, target - 0.31), (at + step + 0.1 * part, draft + 0.31), "0.45")
            _arrow(axes, (at + step - 0.6 * part, draft + 0.31), (at + step, target - 0.31), colour)
    note = "grey arrow: the outcome (k, t*) goes down;  black: the drafts of the branch that predicted it come up;  "
    axes.text(0, -0.55, note + "red: no branch did", fontsize=7.5, va="center")


def _missed_rounds(hit_rate: float) -> Sequence[int]:
    """Which of the rounds shown had no hit: as many as the hit rate says, from the middle on."""
    count = round((1 - hit_rate) * (_SHOWN - 1))
    return range(_SHOWN // 2, _SHOWN // 2 + count)


def _block(axes: Any, start: float, length: float, lane: float, colour: str, text: str) -> None:
    axes.broken_barh([(start, length)], (lane - 0.3, 0.6), facecolor=colour, edgecolor="0.5", linewidth=0.8)
    axes.text(start + length / 2, lane, text, ha="center", va="center", fontsize=7.5, clip_on=True)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.0})
