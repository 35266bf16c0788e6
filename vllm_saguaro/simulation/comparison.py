"""The four engines side by side in one world, and how that changes with one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from vllm_saguaro.algorithm.timing import (
    DraftTimes,
    best_lookahead,
    depth_in_time,
    expected_tokens,
    first_best,
    ideal_ratio,
)
from vllm_saguaro.simulation.plan import ENGINES, Plan
from vllm_saguaro.simulation.result import Result
from vllm_saguaro.simulation.simulation import simulate, time_to_draft
from vllm_saguaro.simulation.world import HitCurve, World, WorldError

PAPERS_BRANCHES: Final = 24
"""N of the paper's engine unless it is given: three branches a position at K = 7, as its reference implementation."""
NAMES: Final = {"plain": "AR", "sd": "SD", "ssd": "SSD", "ours": "ours"}


@dataclass(frozen=True)
class Compared:
    """One engine in a comparison: its run, and its speed over AR, over SD, and as a share of the ideal.

    The ideal is SD's speed times what can be had at most at its cost ratio (`timing.ideal_ratio`): every outcome a hit,
    drafting hidden altogether. None for AR and SD. `value` is what a sweep varies.
    """

    result: Result
    over_plain: float
    over_sd: float
    share_of_ideal: float | None
    value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "value": self.value,
            "over_plain": self.over_plain,
            "over_sd": self.over_sd,
            "share_of_ideal": self.share_of_ideal,
            **self.result.to_json(),
        }


def best_k(world: World, plan: Plan) -> int:
    """K by the closed formulas: the most tokens a second for SD and SSD, the deepest table in time for ours."""
    batch, ks = plan.batch, range(1, world.longest + 1)
    if plan.engine == "plain":
        return 1
    if plan.engine == "sd":
        return ks[
            first_best(
                [
                    tokens_of(world, k)
                    / (world.serial_factor * world.target_pass.at(batch * (k + 1)) + world.serial_drafting(k, batch))
                    for k in ks
                ]
            )
        ]
    each = -(-batch // plan.drafts)
    most = max(1, plan.most_rows // each) if plan.most_rows else 12
    branches = min(plan.branches or 12, most)
    rows = each * branches
    base, slope = world.draft_pass.line(each, max(each + 1, rows))
    times = DraftTimes(world.fork + world.draft_pass.at(each), max(0.0, base), max(0.0, slope))
    if plan.engine == "ours":
        # A target that does not wait: the deepest table that is there in time.
        in_time = [k for k in ks if depth_in_time(times, rows, time_to_draft(world, batch * (1 + k)), k) == k]
        return max(in_time, default=1)
    asks = world.service + 2 * world.latency
    return max(
        1,
        best_lookahead(
            lambda k: asks + world.target_pass.at(batch * (1 + k)),
            times,
            rows,
            world.reach,
            service=world.service,
            hit_rate=world.hits.at(branches),
        ),
    )


def tokens_of(world: World, k: int) -> float:
    """Tokens of a round with K drafts, all verified."""
    chances = [1.0, *world.reach[:k]]
    return expected_tokens(after / before if before else 0.0 for before, after in pairwise(chances))


def compare(world: World, plan: Plan, k: int | None, engines: Sequence[str] = ENGINES) -> list[Compared]:
    """Run the engines, AR and SD always; each with its best K where `k` is None."""

    def run(engine: str) -> Result:
        own = plan.replace(engine=engine)
        if engine == "ssd" and not own.branches:
            own = own.replace(branches=PAPERS_BRANCHES)
        own = own.replace(k=best_k(world, own) if k is None else k)
        return simulate(world, own)

    results = {engine: run(engine) for engine in ENGINES if engine in (*engines, "plain", "sd")}
    plain, sd = results["plain"].tokens_per_second, results["sd"].tokens_per_second
    ideal = sd * ideal_ratio(world.cost_ratio(results["sd"].k, plan.batch))
    return [
        Compared(
            result,
            result.tokens_per_second / plain,
            result.tokens_per_second / sd,
            result.tokens_per_second / ideal if engine in ("ssd", "ours") else None,
        )
        for engine, result in results.items()
    ]


@dataclass(frozen=True)
class Sweep:
    """One thing that is varied. `at` gives world, plan and K (None: the best) for a value."""

    name: str
    title: str
    values: tuple[float, ...]
    at: Callable[[World, Plan, int | None, float], tuple[World, Plan, int | None]]
    log: bool = False


def _with_cost_ratio(world: World, plan: Plan, k: int | None, value: float) -> tuple[World, Plan, int | None]:
    at = k or min(4, world.longest)
    factor = value / world.cost_ratio(at, plan.batch)
    scaled = world.replace(
        draft_pass=world.draft_pass.times(factor),
        fork=factor * world.fork,
        serial_overhead=factor * world.serial_overhead,
    )
    return scaled, plan, at


def _with_batch(world: World, plan: Plan, k: int | None, value: float) -> tuple[World, Plan, int | None]:
    each = max(2, plan.requests // plan.batch)
    return world, plan.replace(batch=int(value), requests=int(value) * each), k


def _with_drafts(world: World, plan: Plan, k: int | None, value: float) -> tuple[World, Plan, int | None]:
    batch = max(plan.batch, 32)
    return world, plan.replace(drafts=int(value), batch=batch, requests=max(plan.requests, 2 * batch)), k


def _thousands(world: World, plan: Plan, k: int | None, value: float) -> tuple[World, Plan, int | None]:
    return world, plan.replace(batch=int(1000 * value), requests=2 * int(1000 * value)), k


SWEEPS: Final = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "cost-ratio", "c, drafting over verify pass", (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5), _with_cost_ratio
        ),
        Sweep(
            "hit-rate",
            "hit rate",
            (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0),
            lambda world, plan, k, value: (world.replace(hits=HitCurve.constant(value)), plan, k),
        ),
        Sweep("batch", "requests at once", (1, 2, 4, 8, 16, 32, 64), _with_batch, log=True),
        Sweep(
            "k",
            "K, drafts a round",
            (1, 2, 3, 4, 5, 6, 7, 8, 10),
            lambda world, plan, k, value: (world, plan, min(int(value), world.longest)),
        ),
        Sweep(
            "branches",
            "N, predicted outcomes",
            (1, 2, 4, 8, 12, 24, 48, 96),
            lambda world, plan, k, value: (world, plan.replace(branches=int(value)), k),
            log=True,
        ),
        Sweep(
            "drafts",
            "drafts that share the requests (32 at least)",
            (1, 2, 4, 8, 16),
            _with_drafts,
            log=True,
        ),
        Sweep(
            "latency",
            "one way of the network, ms",
            (0.0, 0.01, 0.05, 0.2, 1.0, 3.0, 10.0),
            lambda world, plan, k, value: (world.replace(latency=value / 1e3), plan, k),
        ),
        Sweep("requests", "thousands of requests at once", (0.064, 0.25, 1, 4), _thousands, log=True),
    )
}


def sweep(world: World, plan: Plan, k: int | None, name: str, engines: Sequence[str] = ENGINES) -> Iterator[Compared]:
    """The comparison at each value. Raises WorldError for an unknown name."""
    if name not in SWEEPS:
        raise WorldError(f"sweep {name!r} is not known: write one of {', '.join(SWEEPS)}")
    for value in SWEEPS[name].values:
        for found in compare(*SWEEPS[name].at(world, plan, k, value), engines):
            yield Compared(found.result, found.over_plain, found.over_sd, found.share_of_ideal, value)
