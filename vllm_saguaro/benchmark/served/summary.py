"""What is said about each server under each load: medians with spread, ratios to the first server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_saguaro.benchmark import counters
from vllm_saguaro.benchmark.counters import count
from vllm_saguaro.benchmark.served.records import Repetition, Run
from vllm_saguaro.benchmark.summary import Spread


@dataclass(frozen=True)
class Summary:
    """One server under one load; None for what it does not have. Times are seconds.

    A spread is over the repetitions: of `first_token` (mean, median and 99th percentile of each repetition's requests),
    of `gap_p50`/`gap_p99` (all gaps of a repetition), of `token_seconds` (median over its requests). `over_first` and
    `first_token_over_first` are ratios to the first server, taken repetition by repetition. `same_text` is how many of
    how many texts are equal to its.
    """

    tokens_per_second: Spread
    first_token: Spread
    first_token_p99: Spread
    gap_p50: Spread | None
    gap_p99: Spread | None
    token_seconds: Spread | None
    over_first: Spread | None = None
    first_token_over_first: Spread | None = None
    same_text: list[int] | None = None
    differing: dict[int, int] = field(default_factory=dict)
    hit_rate: float | None = None
    misses: dict[str, int] = field(default_factory=dict)
    late_tables: int = 0
    acceptance: float | None = None
    accepted_by_position: list[float] = field(default_factory=list)
    target_wait_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def summarise(runs: Sequence[Run]) -> dict[str, Summary]:
    """By the name of the run; the first run of each load is what the others are compared with."""
    first: dict[object, Run] = {}
    for run in runs:
        first.setdefault(run.load, run)
    return {run.name: _summary(run, first[run.load]) for run in runs}


def _summary(run: Run, first: Run) -> Summary:
    found = run.repetitions
    total = counters.added(one.counters for one in found)
    hits = count(total, counters.HITS)
    misses = {cause: int(value) for cause, value in counters.by_label(total, counters.MISSES).items()}
    outcomes = hits + sum(misses.values())
    rounds, drafted = count(total, counters.DRAFTS), count(total, counters.DRAFT_TOKENS)
    compared = [one.differing for one in found if one.differing is not None]
    texts = sum(len(one.digests) for one in found if one.differing is not None)
    gaps = [one.gap_seconds for one in found if one.gap_seconds]
    of_a_token = [one.token_seconds for one in found if one.token_seconds]
    return Summary(
        Spread.of(one.tokens_per_second for one in found),
        Spread.of(_quantile(one.first_token_seconds, 0.5) for one in found),
        Spread.of(_quantile(one.first_token_seconds, 0.99) for one in found),
        Spread.of(_quantile(each, 0.5) for each in gaps) if gaps else None,
        Spread.of(_quantile(each, 0.99) for each in gaps) if gaps else None,
        Spread.of(_quantile(each, 0.5) for each in of_a_token) if of_a_token else None,
        None if run is first else _ratio(found, first.repetitions, lambda one: one.tokens_per_second),
        None if run is first else _ratio(found, first.repetitions, lambda one: _quantile(one.first_token_seconds, 0.5)),
        [texts - sum(map(len, compared)), texts] if compared else None,
        {at: place for each in reversed(compared) for at, place in sorted(each.items())},
        hits / outcomes if outcomes else None,
        misses,
        int(count(total, counters.LATE_TABLES)),
        count(total, counters.ACCEPTED) / drafted if drafted else None,
        [value / rounds for value in counters.vector(total, counters.ACCEPTED_PER_POSITION)] if rounds else [],
        counters.mean(total, counters.TARGET_WAIT),
    )


def _ratio(found: Sequence[Repetition], first: Sequence[Repetition], value: Any) -> Spread:
    return Spread.of(value(mine) / value(other) for mine, other in zip(found, first, strict=True))


def _quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above; of at least one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
