"""The engines that the end-to-end tests look at. Each group of them is one process, started once for all tests."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.e2e import plans
from tests.e2e.harness import BASE, DRAFT, EngineRun, Json, engines, is_gone_within, run_engines, saguaro
from tests.e2e.shared_names import names_in_shared_memory

K = 4


def common() -> list[Json]:
    """The scenarios that every placement and plain vLLM go through under the same options."""
    return [
        plans.greedy(1),
        plans.greedy(8),
        plans.few_tokens(),
        plans.stops(),
        plans.several_outputs(),
        plans.processed_logits(),
        plans.mixed(),
    ]


@dataclass(frozen=True)
class Plain:
    """vLLM without us: no speculation, the same with the ragged options, and its own draft_model."""

    default: EngineRun
    ragged: EngineRun
    draft_model: EngineRun


def plain_engines() -> list[Json]:
    own = {"speculative_config": {"method": "draft_model", "model": str(DRAFT), "num_speculative_tokens": K}}
    default = [*common(), plans.only_top_k(), plans.with_events("eight at once")]
    return [
        {"options": BASE, "scenarios": default},
        {"options": BASE | plans.RAGGED, "scenarios": [plans.ragged_arrivals()]},
        {"options": BASE | own, "scenarios": [plans.greedy(1)]},
    ]


@dataclass(frozen=True)
class Inline:
    """The synchronous twin: every table is complete, and the same run gives the same result."""

    default: EngineRun
    ragged: EngineRun
    fan_outs: dict[str, EngineRun]


FAN_OUTS: dict[str, Json] = {
    "uniform, K=2, N=6": {"fan_out": "uniform", "num_speculative_tokens": 2, "branches": 6},
    "ranked, K=6, N=48": {"num_speculative_tokens": 6, "branches": 48},
    "geometric, K=1, N=1": {"fan_out": "geometric", "num_speculative_tokens": 1, "branches": 1},
}


# Drafts that are the draft model's likeliest tokens, from the cache alone: those can be compared with draft_model's,
# and judged one by one. The other kinds have their own tests (tests/exactness/test_end_to_end.py, test_requests.py).
INLINE: Json = {"placement": "inline", "branches": 12, "backup": "none", "draft_sample_method": "greedy"}


def inline_engines() -> list[Json]:
    options = BASE | saguaro(**INLINE)
    default = [
        *common(),
        *(plans.samples(variant) for variant in plans.VARIANTS if "top_k" not in variant),
        plans.seeded("seeds"),
        plans.seeded("the same seeds"),
        *(plans.greedy(8, name=how, count=8, sabotage=how) for how in ("no_copy", "wrong_branch")),
    ]
    ragged = {"options": options | plans.RAGGED, "scenarios": [plans.ragged_arrivals()]}
    return [{"options": options, "scenarios": default}, ragged]


def fan_out_engines() -> list[Json]:
    return [
        {"options": BASE | saguaro(**INLINE | keys), "scenarios": [plans.greedy(8, count=8)]}
        for keys in FAN_OUTS.values()
    ]


def top_k_engine() -> Json:
    """An engine of its own: vLLM's CPU sampler cannot take top_k where no row of a batch has drafts."""
    scenarios = [plans.samples(variant) for variant in plans.VARIANTS if "top_k" in variant]
    return {"options": BASE | saguaro(**INLINE), "scenarios": [*scenarios, plans.only_top_k()]}


@pytest.fixture(scope="session")
def side_by_side() -> dict[str, Future[list[EngineRun]]]:
    """All engines that need no second core, on a core each: two run at any time, and neither waits for the other."""
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        return {
            "inline": one.submit(run_engines, inline_engines(), cpus=[last]),
            "plain": other.submit(run_engines, plain_engines(), cpus=[first]),
            "other twins": other.submit(run_engines, [top_k_engine(), *fan_out_engines()], cpus=[first]),
        }


@pytest.fixture(scope="session")
def plain(side_by_side: dict[str, Future[list[EngineRun]]]) -> Plain:
    return Plain(*side_by_side["plain"].result())


@pytest.fixture(scope="session")
def inline(side_by_side: dict[str, Future[list[EngineRun]]]) -> Inline:
    default, ragged = side_by_side["inline"].result()
    _, *fan_outs = side_by_side["other twins"].result()
    return Inline(default, ragged, dict(zip(FAN_OUTS, fan_outs, strict=True)))


@pytest.fixture(scope="session")
def only_top_k(side_by_side: dict[str, Future[list[EngineRun]]]) -> EngineRun:
    return side_by_side["other twins"].result()[0]


@dataclass(frozen=True)
class Process:
    """The draft in a process of its own: ended in order, killed in mid-run, and left behind by a killed engine."""

    default: EngineRun
    draftless: EngineRun
    ragged: EngineRun
    memory_left: set[str]
    draft_gone_after_shutdown: bool
    draft_gone_after_kill: bool


@pytest.fixture(scope="session")
def process() -> Process:
    options = BASE | saguaro(placement="process")
    scenarios = [
        *common(),
        plans.samples("T=0.8"),
        plans.with_events("draft stopped", (8, "stop_draft")),
        plans.with_events("draft back", (0, "continue_draft")),
    ]
    # On a busy machine a killed process may take seconds until it has ended: so much is waited for.
    killed = [
        plans.with_events("draft killed", (8, "kill_draft"), (12, "await_left_off")),
        plans.with_events("without a draft"),
    ]
    with (
        names_in_shared_memory() as names,
        engines(
            [
                {"options": options, "scenarios": scenarios, "care": {"hang": 600.0}},
                {"options": BASE | saguaro(placement="process", draft_restarts=0, adaptive=False), "scenarios": killed},
                {"options": options | plans.RAGGED, "scenarios": [plans.ragged_arrivals()], "end": "wait"},
            ]
        ) as group,
    ):
        default = group.read_engine()
        after_shutdown = is_gone_within(default.answer["draft_pid"], 3)
        draftless = group.read_engine()
        ragged = group.read_engine()
        group.process.kill()
        after_kill = is_gone_within(ragged.answer["draft_pid"], 3)
    return Process(default, draftless, ragged, names.left(), after_shutdown, after_kill)
