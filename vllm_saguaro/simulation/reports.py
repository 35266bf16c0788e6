"""Reports of scripts/bench.py as worlds, and as the numbers that a simulation is held against.

Of each workload of a report, plain, `draft_model` and one saguaro engine tell the world: times of passes, acceptance
(that of `draft_model`), the share of outcomes that were predicted. The speed, the tokens a round and the late tables of
saguaro are what is predicted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError

JITTER: Final = 0.1
"""[assumed] Reports have means alone; passes and draft rounds are taken to vary by a tenth."""
BRANCHES: Final = 12
"""[assumed] N where it chose itself; the report has only its last value."""
GUESS_REACH: Final = (0.4, 0.16, 0.06, 0.03)
"""[assumed] Acceptance of n-gram guesses, whose own is not in a report: the policy's prior, 0.4 a token."""
ROWS_FACTOR: Final = 1.3
"""[docs/results.md] A draft forward over 12 rows takes so many times one over a single row. Used where more than RARELY
of the tables are late: the few rounds that were finished are then not like the others."""
RARELY: Final = 0.9
RESTS_SINCE: Final = "2026-11-27T06:20"
"""Drafts of engines that were measured before this went on with depths that came too late (`timing.comes_too_late`)."""
_MISSES: Final = "vllm:saguaro_misses{cause="


@dataclass(frozen=True, eq=False)
class Measured:
    """One engine under one workload, over all its repetitions."""

    mode: str
    k: int
    branches: int
    batch: int
    temperature: float
    label: str
    options: Mapping[str, Any]
    requests: int
    tokens: int
    tokens_per_second: float
    tokens_per_round: float
    step_seconds: float
    rows_a_step: float
    drafting_seconds: float
    counters: Mapping[str, float]
    rests: bool
    """Whether its draft left out depths that would have come too late."""

    @property
    def reach(self) -> tuple[float, ...]:
        """P(at least j accepted) in rounds that had drafts."""
        rounds = self.counters.get("vllm:spec_decode_num_drafts", 0.0)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        return tuple(self.counters.get(f"{name}[{j}]", 0.0) / rounds for j in range(self.k)) if rounds else ()

    @property
    def predicted(self) -> float:
        """Outcomes that were predicted, of those whose table was there to look at."""
        hits, missed = self.counters["vllm:saguaro_hits"], self.counters.get(f"{_MISSES}not_predicted}}", 0.0)
        return hits / (hits + missed) if hits + missed else 0.0

    @property
    def late_share(self) -> float:
        """Hits with fewer than K drafts because the table was late, of all hits."""
        hits = self.counters.get("vllm:saguaro_hits", 0.0)
        return self.counters.get("vllm:saguaro_late_tables", 0.0) / hits if hits else 0.0

    @property
    def tokens_a_pass(self) -> float:
        """Rows and drafts in a pass of the target."""
        passes = self.counters.get("vllm:saguaro_verify_seconds.count", 0.0)
        drafts = self.counters.get("vllm:spec_decode_num_draft_tokens", 0.0)
        return self.rows_a_step + (drafts / passes if passes else 0.0)

    def mean(self, histogram: str) -> float:
        """Of a time histogram of ours, in seconds; 0 where there is none."""
        number = self.counters.get(f"vllm:saguaro_{histogram}_seconds.count", 0.0)
        return self.counters.get(f"vllm:saguaro_{histogram}_seconds.sum", 0.0) / number if number else 0.0

    @property
    def chooses_itself(self) -> bool:
        """Whether K is adapted: not in reports from before that was counted."""
        return "vllm:saguaro_quiet_steps" in self.counters and self.options.get("adaptive") is not False


@dataclass(frozen=True)
class Bench:
    """One workload of a report: its engines."""

    name: str
    plain: Measured
    baselines: tuple[Measured, ...]
    ours: tuple[Measured, ...]


def read_report(path: Path) -> list[Bench]:
    """The workloads of a report (or of every report of a curve) that have all three modes, with the draft in a process.

    Raises WorldError where the file is no such report.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = data["reports"] if data.get("kind") == "curve" else [data]
        return [bench for part in parts for bench in _benches(path.stem, part)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorldError(f"{path} is no report of scripts/bench.py ({type(error).__name__}: {error})") from None


def world_of(bench: Bench, told: Measured) -> World:
    """What plain, `draft_model` and the engine `told` say of models and machine: see the keys of `source`.

    Raises WorldError where the drafting of `draft_model` was not timed (model runner V2).
    """
    deepest = max(bench.baselines, key=lambda measured: measured.k)
    if not deepest.drafting_seconds:
        raise WorldError(f"{bench.name} has no time of draft_model's drafting: take a report of model runner V1")
    rows, batch = deepest.rows_a_step, bench.plain.rows_a_step
    tokens, seconds = told.tokens_a_pass, told.step_seconds
    slope = max(0.0, (seconds - bench.plain.step_seconds) / (tokens - batch)) if tokens > batch else 0.0
    slope = min(slope, seconds / tokens)  # few tokens more than plain's tell little of one: never less than nothing
    target = PassTime.linear(seconds - slope * tokens, slope)
    verify = deepest.step_seconds - deepest.drafting_seconds
    serial = verify / target.at(rows * (deepest.k + 1))
    # On a device of its own the draft keeps its caches, as the target does.
    own = max(1.0, serial)
    overhead, step = (x / own for x in _line([(float(m.k), m.drafting_seconds) for m in bench.baselines]))
    # A finished draft round is the glue forward over the requests, the choice, and K forwards over their branches.
    per_branch = max(step, (told.mean("draft_round") - overhead - step) / told.k)
    rarely = told.late_share > RARELY
    if rarely:
        per_branch = ROWS_FACTOR * step
    many = max(rows + 1, told.rows_a_step * (told.branches or BRANCHES))
    misses = sum(value for name, value in told.counters.items() if name.startswith(_MISSES))
    guesses = told.counters.get("vllm:saguaro_backups{kind=ngram}", 0.0)
    return World(
        name=bench.name,
        target_pass=target,
        draft_pass=PassTime(((rows, step), (many, per_branch))),
        reach=tuple(sorted(deepest.reach, reverse=True)),
        hits=HitCurve.constant(min(1.0, told.predicted)),
        fork=overhead,
        guessed=min(1.0, guesses / misses) if misses else 0.0,
        guess_reach=GUESS_REACH if guesses else (),
        jitter=JITTER,
        serial_factor=serial,
        serial_overhead=overhead,
        source={
            "target_pass": f"plain, and {told.label} with all that it verified, as a line over the tokens",
            "draft_pass": "draft_model's drafting by K; "
            + (f"{ROWS_FACTOR} times that over branches (assumed)" if rarely else f"a draft round of {told.label}"),
            "reach": f"{deepest.label}",
            "hits": f"{told.label}: outcomes found, of those whose table was there",
            "fork": "draft_model's drafting at K = 0, extrapolated",
            "serial_factor": f"{deepest.label}: its verify pass over saguaro's; taken for its drafting, too",
            "jitter": "assumed",
            "guess_reach": "assumed",
        },
    )


def plan_of(measured: Measured) -> Plan:
    """The same load in a simulation; four times as many requests, so that chance counts less."""
    engine = {"plain": "plain", "draft_model": "sd", "saguaro": "ours"}[measured.mode]
    return Plan(
        engine=engine,
        k=max(1, measured.k),
        branches=measured.branches or BRANCHES,
        batch=measured.batch,
        requests=4 * measured.requests,
        tokens=measured.tokens,
        waves=True,
        adaptive=measured.chooses_itself,
        rests=measured.rests,
        most_rows=0,
    )


def _benches(name: str, report: Mapping[str, Any]) -> list[Bench]:
    rests = report["provenance"]["date"] >= RESTS_SINCE
    found = [_measured(run, report["settings"], rests) for run in report["runs"]]
    found = [m for m in found if m.options.get("placement", "process") == "process"]
    found = [m for m in found if m.options.get("backup", "auto") in ("auto", "none")]  # others are not modelled
    settings = report["settings"]
    depths = f"{settings['target_layers']} + {settings['draft_layers']} layers"
    benches = []
    for batch, temperature in dict.fromkeys((m.batch, m.temperature) for m in found):
        own = [m for m in found if (m.batch, m.temperature) == (batch, temperature)]
        plain = next((m for m in own if m.mode == "plain"), None)
        ours = tuple(m for m in own if m.mode == "saguaro")
        baselines = _best_by_k(m for m in own if m.mode == "draft_model")
        if plain is not None and ours and baselines:
            title = f"{name}: {depths}, batch {batch}, T={temperature:g}"
            benches.append(Bench(title, plain, baselines, ours))
    return benches


def _best_by_k(measured: Iterable[Measured]) -> tuple[Measured, ...]:
    """Of several ways to draft with one K the fastest."""
    best: dict[int, Measured] = {}
    for one in measured:
        if one.k not in best or one.tokens_per_second > best[one.k].tokens_per_second:
            best[one.k] = one
    return tuple(best[k] for k in sorted(best))


def _measured(run: Mapping[str, Any], settings: Mapping[str, Any], rests: bool) -> Measured:
    engine, workload, repetitions = run["engine"], run["workload"], run["repetitions"]
    total = {
        name: sum(repetition[name] for repetition in repetitions)
        for name in ("decode_seconds", "decode_tokens", "rounds", "steps", "drafting_seconds")
    }
    counters: dict[str, float] = {}
    for repetition in repetitions:
        for name, value in repetition["counters"].items():
            counters[name] = counters.get(name, 0.0) + value
    branches = engine.get("branches", 0)
    return Measured(
        mode=engine["mode"],
        k=engine["k"],
        branches=branches if isinstance(branches, int) else 0,
        batch=workload["batch"],
        temperature=workload["temperature"],
        label=f"{engine['mode']} K={engine['k']}" if engine["k"] else engine["mode"],
        options=dict(engine.get("options", ())),
        requests=len(repetitions[0]["digests"]),
        tokens=settings["tokens"] - 1,
        tokens_per_second=statistics.median(r["decode_tokens"] / r["decode_seconds"] for r in repetitions),
        tokens_per_round=total["decode_tokens"] / total["rounds"],
        step_seconds=total["decode_seconds"] / total["steps"],
        rows_a_step=total["rounds"] / total["steps"],
        drafting_seconds=total["drafting_seconds"] / total["steps"],
        counters=counters,
        rests=rests,
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at 0 (not below it) and slope of the line through the first point and the last."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if x1 == x0 or not 0 < slope * x0 <= y0:
        return 0.0, y0 / x0
    return y0 - slope * x0, slope
