"""The engines that the V2 tests look at: three processes, each started once, and only where a test asks for it."""

from __future__ import annotations

import pytest

from tests.e2e.harness import Json
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, V2Run, run_v2, saguaro

SCRIPTS = ("oracle", "none", "garbage", "mixed", "depths")


@pytest.fixture(scope="session")
def steady() -> tuple[V2Run, V2Run]:
    """Plain vLLM, and scripted drafts beside it: whole batches, vLLM's start-up calls, errors; scheduled in step."""
    plain = [v2_plans.greedy("greedy"), v2_plans.processed("processed")]
    ours = [
        *(v2_plans.greedy(script, script=script) for script in SCRIPTS),
        v2_plans.processed("processed", script="depths"),
        v2_plans.greedy_among_sampled("among sampled", script="drawn"),
        v2_plans.structured("structured", script="drawn"),
        v2_plans.greedy("guarded", script="depths", guarded=True),
        v2_plans.greedy_among_sampled("guarded, sampled", script="drawn", guarded=True),
        v2_plans.greedy("draft failed", script="raise"),
        v2_plans.greedy("after it failed", script="oracle"),
    ]
    both = run_v2(
        [
            {"options": OPTIONS, "scripted": False, "scenarios": plain},
            {"options": OPTIONS | saguaro(draft_sample_method="probabilistic"), "start_up": True, "scenarios": ours},
        ]
    )
    return both[0], both[1]


@pytest.fixture(scope="session")
def ragged() -> tuple[V2Run, V2Run, V2Run]:
    """Plain vLLM, and drafts beside it where the host is a step ahead; the last one ends with a draft that reads."""
    options = OPTIONS | v2_plans.RAGGED
    ours = [v2_plans.ragged(script, script=script) for script in ("depths", "mixed")]
    reading = v2_plans.greedy("reads", script="oracle", guarded=True, plant="reads on the host")
    by_rows = [[rows, rows, k] for rows, k in sorted(v2_plans.SCHEDULED.items())]
    schedule = {"num_speculative_tokens_per_batch_size": by_rows}
    plain, async_run, last = run_v2(
        [
            {
                "options": options,
                "scripted": False,
                "scenarios": [v2_plans.ragged("ragged"), v2_plans.leaving("leaving")],
            },
            {
                "options": options | saguaro(max_model_len=v2_plans.LONGEST_DRAFT),
                "async": True,
                "scenarios": [*ours, v2_plans.ragged("guarded", script="depths", guarded=True)],
            },
            {
                "options": OPTIONS | saguaro(draft_sample_method="greedy", **schedule),
                "async": True,
                "scenarios": [v2_plans.leaving("scheduled K", script="oracle"), reading],
            },
        ]
    )
    return plain, async_run, last


MADE_UP: Json = {"candidates": v2_plans.CANDIDATES}


def run_samples(*scenarios: Json) -> V2Run:
    """Over a small vocabulary; async."""
    ours = saguaro(num_speculative_tokens=3, draft_sample_method="probabilistic")
    options = OPTIONS | {"max_num_seqs": 32} | ours
    return run_v2([{"options": options, "async": True, "scenarios": list(scenarios)}])[0]


def wrong(error: str) -> Json:
    """Samples with an error in them: a script of that name, or a plant."""
    how = {"script": error} if error in ("lie", "stale") else {"script": "drawn", "plant": error}
    return v2_plans.samples(error, 32, **how, **MADE_UP)


@pytest.fixture(scope="session")
def sampled() -> V2Run:
    """Samples with drafts that are drawn, and what planted errors make of them."""
    drawn = v2_plans.samples("drawn", 96, script="drawn", **MADE_UP)
    return run_samples(drawn, wrong("lie"), wrong("unmarked"))


@pytest.fixture(scope="session")
def sampled_late() -> V2Run:
    """What comes a step late."""
    return run_samples(wrong("stale"), wrong("marked one late"))
