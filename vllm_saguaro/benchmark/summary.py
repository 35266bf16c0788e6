"""From repetitions to what is said about them: medians with spread, paired ratios, times of a round, the ideal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_saguaro.algorithm.timing import ideal_ratio
from vllm_saguaro.benchmark import counters, forecasts
from vllm_saguaro.benchmark.records import Engine, Run, Workload


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Summary:
    """One engine under one workload. None stands for what this mode does not have or nobody measured.

    Times are seconds and means over all decode rounds of all repetitions. `verify_seconds` is scheduling and verify
    pass: for draft_model a step without the time in the drafter, for saguaro what it reports, for plain a whole step.
    `cost_ratio` is c = drafting / verify of draft_model. `over_best` is the ratio to draft_model at its best K.
    `forecasts` are the counts of a `ForecastProbe` over all repetitions.
    """

    tokens_per_second: Spread
    wall_tokens_per_second: Spread
    tokens_per_round: float
    step_seconds: float
    over_plain: Spread | None = None
    over_same_k: Spread | None = None
    over_best: Spread | None = None
    best_k: int | None = None
    accepted_per_draft: float | None = None
    acceptance: list[float] = field(default_factory=list)
    verify_seconds: float | None = None
    drafting_seconds: float | None = None
    cost_ratio: float | None = None
    hit_rate: float | None = None
    hits: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    late_tables: int = 0
    backups: dict[str, int] = field(default_factory=dict)
    quiet_steps: int = 0
    draft_round_seconds: float | None = None
    target_wait_seconds: float | None = None
    ideal_over_same_k: float | None = None
    ideal_over_best: float | None = None
    reached_same_k: float | None = None
    reached_best: float | None = None
    same_text: list[int] | None = None
    forecasts: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def paired(run: Run, other: Run) -> Spread:
    """The ratio of speeds, repetition by repetition: what slows a whole repetition down falls out."""
    return Spread.of(
        mine.tokens_per_second / theirs.tokens_per_second
        for mine, theirs in zip(run.repetitions, other.repetitions, strict=True)
    )


def summarise(runs: Sequence[Run]) -> dict[str, Summary]:
    """All runs of a report by their names, compared with one another within each workload."""
    found: dict[str, Summary] = {}
    for workload in dict.fromkeys(run.workload for run in runs):
        found |= _summarise_workload([run for run in runs if run.workload == workload])
    return found


def _summarise_workload(runs: Sequence[Run]) -> dict[str, Summary]:
    alone = {run.engine: summarise_alone(run) for run in runs}
    plain = next((run for run in runs if run.engine.mode == "plain"), None)
    # Slowest first: of several at one K the fastest stays.
    others = sorted(
        (run for run in runs if run.engine.mode == "draft_model"),
        key=lambda run: alone[run.engine].tokens_per_second.median,
    )
    baselines = {run.engine.k: run for run in others}
    best_k = others[-1].engine.k if others else None
    for run in runs:
        summary = alone[run.engine]
        if plain is not None:
            summary.over_plain = paired(run, plain)
        if run.engine.mode == "plain" or best_k is None:
            continue
        summary.best_k = best_k
        summary.over_best = paired(run, baselines[best_k])
        if run.engine.k in baselines:
            summary.over_same_k = paired(run, baselines[run.engine.k])
        if run.engine.mode == "saguaro":
            same = baselines.get(run.engine.k)
            summary.ideal_over_best = ideal(summary, alone[baselines[best_k].engine])
            summary.ideal_over_same_k = ideal(summary, alone[same.engine]) if same else None
            summary.reached_best = _share(summary.over_best, summary.ideal_over_best)
            summary.reached_same_k = _share(summary.over_same_k, summary.ideal_over_same_k)
    return {run.name: alone[run.engine] for run in runs}


def summarise_alone(run: Run) -> Summary:
    """What can be said of a run without the others."""
    repetitions = run.repetitions
    table = counters.added(repetition.counters for repetition in repetitions)
    rounds = sum(repetition.rounds for repetition in repetitions)
    steps = sum(repetition.steps for repetition in repetitions)
    decode_seconds = sum(repetition.decode_seconds for repetition in repetitions)
    step_seconds = decode_seconds / steps if steps else 0.0
    summary = Summary(
        tokens_per_second=Spread.of(repetition.tokens_per_second for repetition in repetitions),
        wall_tokens_per_second=Spread.of(repetition.tokens / repetition.wall_seconds for repetition in repetitions),
        tokens_per_round=sum(repetition.decode_tokens for repetition in repetitions) / rounds if rounds else 0.0,
        step_seconds=step_seconds,
        same_text=_same_text(run),
        forecasts=forecasts.over_repetitions(repetition.forecasts for repetition in repetitions),
    )
    drafts = counters.count(table, counters.DRAFTS)
    if drafts:
        summary.accepted_per_draft = counters.count(table, counters.ACCEPTED) / drafts
        summary.acceptance = [value / drafts for value in counters.vector(table, counters.ACCEPTED_PER_POSITION)]
    if run.engine.mode == "plain":
        summary.verify_seconds = step_seconds
    elif run.engine.mode == "draft_model":
        _draft_model_times(summary, run, steps)
    else:
        _saguaro_counters(summary, table)
    return summary


def _same_text(run: Run) -> list[int] | None:
    """Texts equal to plain's, and texts in all; None where there is nothing to compare."""
    counted = [(repetition.same_text, len(repetition.digests)) for repetition in run.repetitions]
    if any(same is None for same, _ in counted):
        return None
    return [sum(same or 0 for same, _ in counted), sum(total for _, total in counted)]


def _draft_model_times(summary: Summary, run: Run, steps: int) -> None:
    drafting = sum(repetition.drafting_seconds for repetition in run.repetitions)
    if not steps or not drafting:
        return
    summary.drafting_seconds = drafting / steps
    summary.verify_seconds = summary.step_seconds - summary.drafting_seconds
    summary.cost_ratio = summary.drafting_seconds / summary.verify_seconds


def _saguaro_counters(summary: Summary, table: dict[str, float]) -> None:
    hits, misses = counters.count(table, counters.HITS), counters.count(table, counters.MISSES)
    summary.hits = int(hits)
    summary.misses = {cause: int(value) for cause, value in counters.by_label(table, counters.MISSES).items()}
    summary.late_tables = int(counters.count(table, counters.LATE_TABLES))
    summary.backups = {kind: int(value) for kind, value in counters.by_label(table, counters.BACKUPS).items() if value}
    summary.quiet_steps = int(counters.count(table, counters.QUIET_STEPS))
    summary.hit_rate = hits / (hits + misses) if hits + misses else None
    summary.verify_seconds = counters.mean(table, counters.VERIFY)
    summary.draft_round_seconds = counters.mean(table, counters.DRAFT_ROUND)
    summary.target_wait_seconds = counters.mean(table, counters.TARGET_WAIT)


def ideal(saguaro: Summary, baseline: Summary) -> float | None:
    """Saguaro over draft_model if nothing but the model's own times counted: the formula with what was measured.

    E_hit is measured; a missed request verifies without drafts, so E_miss = 1 and T_b = 0. T_p is saguaro's draft round
    in units of its own verify pass, T_SD the cost ratio of draft_model. None where the formula is not about what
    happened: backups, steps without drafts, or tables that the target did not wait for in most rounds.
    """
    if (
        saguaro.hit_rate is None
        or saguaro.backups
        or saguaro.quiet_steps
        or (saguaro.late_tables or 0) > (saguaro.hits or 0) / 2
        or saguaro.draft_round_seconds is None
        or not saguaro.verify_seconds
        or baseline.cost_ratio is None
    ):
        return None
    return ideal_ratio(
        baseline.cost_ratio,
        hit_rate=saguaro.hit_rate,
        primary=saguaro.draft_round_seconds / saguaro.verify_seconds,
        backup=0.0,
        tokens_hit=1 + (saguaro.accepted_per_draft or 0.0),
        tokens_miss=1.0,
        tokens=baseline.tokens_per_round,
    )


def _share(measured: Spread | None, ideal_value: float | None) -> float | None:
    return measured.median / ideal_value if measured and ideal_value else None


def find(runs: Sequence[Run], engine: Engine, workload: Workload) -> Run:
    """The run of an engine under a workload."""
    return next(run for run in runs if run.engine == engine and run.workload == workload)
