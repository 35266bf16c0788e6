"""Tokens a second that were not measured: passes, acceptance and hits as a `World`, which is simulated."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Final

from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.drafting.pace import CHOICES
from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.reports import JITTER, ROWS_FACTOR
from vllm_saguaro.simulation.simulation import simulate
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError
from vllm_saguaro.tuning.candidates import Load, Speeds
from vllm_saguaro.tuning.observations import Observations

MOST_ROWS: Final = 256
"""Rows of one draft forward at most (`drafting/loop.py`)."""
_ROWS_OF_FACTOR: Final = 12
_REQUESTS: Final = 4
"""Simulated for each place of a batch."""
_TOKENS: Final = 64


def world_of(
    all_loads: Observations, own: Observations, branches: int, drafts: int, name: str = "measured here"
) -> World:
    """What a simulation is fed with. Times from `all_loads`, acceptance and hits from `own`: those of one temperature.

    `branches`: N of the engine that was watched; `drafts`: K at most. Raises WorldError where too little was seen.
    """
    step, fork = draft_times(all_loads, branches)
    reach = tuple(accumulate(own.chances(drafts), mul))
    return World(
        name=name,
        target_pass=target_times(all_loads),
        draft_pass=step,
        reach=reach,
        hits=hit_curve(own, branches),
        fork=fork,
        jitter=JITTER,
        source={
            "target_pass": "verify passes by tokens",
            "draft_pass": "tables by requests and depth",
            "reach": "drafts from the cache, by place",
            "hits": "places of the outcomes among the predicted ones",
            "jitter": "assumed",
        },
    )


def target_times(seen: Observations) -> PassTime:
    """Verify passes by tokens: medians over sizes that double, none shorter than a smaller one."""
    buckets: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (_, tokens), times in seen.passes.items():
        buckets[max(1, tokens).bit_length()].extend((tokens, seconds) for seconds in times)
    points = [
        (statistics.fmean(tokens for tokens, _ in bucket), statistics.median(seconds for _, seconds in bucket))
        for _, bucket in sorted(buckets.items())
    ]
    if not points:
        raise WorldError("no verify pass was seen")
    return PassTime(_rising(points))


def draft_times(seen: Observations, branches: int) -> tuple[PassTime, float]:
    """A step of the draft by its rows, and what a round has beside its forwards.

    A table of depth d is there after fork, a forward over the requests, and d steps over their branches. Where one
    depth alone was seen, all of its forwards are taken to be equal.
    """
    by_rows: dict[int, dict[int, list[float]]] = defaultdict(dict)
    for (rows, depth), times in seen.tables.items():
        if depth:
            by_rows[rows][depth] = times
    points: dict[float, float] = {}
    glue: list[tuple[int, float]] = []
    for rows, tables in sorted(by_rows.items()):
        base, step = _line([(depth, seconds) for depth, times in tables.items() for seconds in times])
        points[rows * max(1, min(branches, MOST_ROWS // rows))] = step
        glue.append((rows, base))
    if not points:
        raise WorldError("no table of the draft was seen")
    line = _rising(sorted(points.items()))
    size, seconds = line[0]
    if size > 1:
        # Towards one row: what more rows cost the draft of docs/results.md, where it was not measured here.
        less = 1 + (ROWS_FACTOR - 1) * min(1.0, (size - 1) / (_ROWS_OF_FACTOR - 1))
        line = ((1.0, seconds / less), *line)
    step_times = PassTime(line)
    return step_times, statistics.median(max(0.0, base - step_times.at(rows)) for rows, base in glue)


def hit_curve(seen: Observations, branches: int) -> HitCurve:
    """The share of outcomes among the N likeliest, up to the N that was watched."""
    if not seen.outcomes:
        raise WorldError("no outcome met a table")
    sizes = [n for n in CHOICES if n < branches] + [branches]
    points = [(float(n), seen.hit_rate(n)) for n in sizes]
    # Points of one height in a row tell the same as the first of them, and no exponent.
    kept = [points[0], *(here for before, here in pairwise(points) if here[1] > before[1])]
    return HitCurve(tuple(kept)) if len(kept) > 1 else HitCurve.constant(kept[0][1])


def priors_of(worlds: Sequence[World]) -> Priors:
    """What an engine begins with: the means over the worlds (the temperatures), lines through the times."""
    first = worlds[0]
    low, high = first.target_pass.points[0][0], first.target_pass.points[-1][0]
    base, slope = first.target_pass.line(low, high) if high > low else (first.target_pass.at(low), 0.0)
    rows = first.draft_pass.points
    step_base, step_slope = first.draft_pass.line(rows[0][0], rows[-1][0])
    chances = [statistics.fmean(_chance(world.reach, place) for world in worlds) for place in range(len(first.reach))]
    return Priors(
        target_pass=_positive(base, slope, first.target_pass.at(low) / low),
        draft_step=_positive(step_base, step_slope, first.draft_pass.at(rows[0][0]) / rows[0][0]),
        glue=first.fork + first.draft_pass.at(1),
        acceptance=tuple(chances),
        hits=tuple((n, statistics.fmean(world.hits.at(n) for world in worlds)) for n in CHOICES),
    )


def predict(worlds: Mapping[float, World], load: Load, k: int, branches: int, engine: str = "ours") -> float:
    """Tokens a second of an engine; `branches` 0: as many as pay. `worlds`: by temperature."""
    batch, temperature = load
    plan = Plan(engine, k=k, branches=branches, batch=batch, requests=_REQUESTS * batch, tokens=_TOKENS, adaptive=True)
    return simulate(worlds[temperature], plan).tokens_per_second


def predictions(
    worlds: Mapping[float, World], loads: Iterable[Load], ks: Sequence[int], sizes: Sequence[int]
) -> dict[tuple[int, int], Speeds]:
    """Of every K and N, tokens a second by load."""
    loads = list(loads)
    return {(k, n): {load: predict(worlds, load, k, n) for load in loads} for k in ks for n in sizes}


def _chance(reach: Sequence[float], place: int) -> float:
    """P(accepted | those before it were)."""
    before = reach[place - 1] if place else 1.0
    return min(1.0, reach[place] / before) if before > 0 else 0.0


def _positive(base: float, slope: float, proportional: float) -> tuple[float, float]:
    """A line whose parts are not negative; through the origin where its base would be."""
    return (base, max(0.0, slope)) if base >= 0 else (0.0, proportional)


def _rising(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """None lower than the one before it: a larger forward is not faster, only measured at another moment."""
    found: list[tuple[float, float]] = []
    for size, seconds in points:
        found.append((size, max(seconds, found[-1][1]) if found else seconds))
    return tuple(found)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Value at 0 and slope, neither negative, by least squares; of one depth alone: seconds = (depth + 1) slope."""
    mean_x, mean_y = (statistics.fmean(point[axis] for point in points) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    if slope <= 0 or mean_y - slope * mean_x < 0:
        slope = mean_y / (mean_x + 1)
    return max(0.0, mean_y - slope * mean_x), slope
