"""Which outcomes get a branch: a fan-out over the accepted length, with measured acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from scripts.illustrations.canvas import DRAFT, QUIET, TARGET, box, new_drawing, save
from vllm_saguaro.algorithm.outcomes import fan_out_from_lengths
from vllm_saguaro.benchmark.records import Report, Workload
from vllm_saguaro.benchmark.summary import summarise

_WORKLOAD = Workload(1, 0.0)
_STEP = 2.6
_EXPONENT = 1.0
"""Of the paper's power law: a fan-out of F misses with chance 1 / F."""


def accepted_lengths(report: Report, k: int) -> list[float]:
    """P(0), P(1), .. P(k): how often so many drafts were accepted by `draft_model` at batch 1 and temperature 0.

    Raises ValueError where the report has no such run.
    """
    summaries = summarise(report.runs)
    for run in report.runs:
        if run.engine.mode == "draft_model" and run.engine.k == k and run.workload == _WORKLOAD:
            reached = [1.0, *summaries[run.name].acceptance, 0.0]
            return [here - beyond for here, beyond in pairwise(reached)]
    raise ValueError(f"the report has no draft_model at {_WORKLOAD.name} with K={k}")


def draw_outcomes(lengths: Sequence[float], branches: int, path: Path) -> Path:
    """The speculation along the top, and below each place the outcomes that end there."""
    fan_out = fan_out_from_lengths(lengths, branches, _EXPONENT)
    k = len(lengths) - 1
    rows = max(fan_out)
    figure, axes = new_drawing(10.5, 0.42 * rows + 1.9, 1.9 + _STEP * (k + 1), 0.62 * rows + 3.0)
    top = 0.62 * rows + 1.2
    axes.text(0.05, top + 0.3, "under\nverification", fontsize=8, va="center")
    axes.text(0.05, top - 0.55, "outcomes\nwith a branch", fontsize=8, va="center")
    for place, (probability, count) in enumerate(zip(lengths, fan_out, strict=True)):
        left = 1.7 + _STEP * place
        if place < k:
            box(axes, left + 0.9, top, 1.2, 0.6, TARGET)
            axes.text(left + 1.5, top + 0.3, f"x{place + 1}", ha="center", va="center", fontsize=9)
            axes.plot([left, left + 0.9], [top + 0.3] * 2, color="0.45", linewidth=1)
        if place:
            axes.plot([left - 0.5, left], [top + 0.3] * 2, color="0.45", linewidth=1)
        axes.text(left, top + 1.05, f"k = {place}: {probability:.0%}", fontsize=9, va="center", weight="bold")
        axes.plot([left, left], [top + 0.3, top - 0.62 * count + 0.05], color="0.45", linewidth=1)
        for number in range(count):
            bottom = top - 0.62 * (number + 1) - 0.16
            axes.plot([left, left + 0.2], [bottom + 0.21] * 2, color="0.45", linewidth=1)
            box(axes, left + 0.2, bottom, 0.5, 0.42, QUIET)
            axes.text(left + 0.45, bottom + 0.2, f"t{number + 1}", ha="center", va="center", fontsize=7.5)
            for depth in range(k):
                box(axes, left + 0.78 + 0.3 * depth, bottom + 0.08, 0.24, 0.26, DRAFT)
    note = (
        f"N = {branches} branches: grey the bonus token t* that ends the round, green the {k} drafts that wait for it"
    )
    axes.text(0.05, 0.12, note, fontsize=8)
    return save(figure, path)
