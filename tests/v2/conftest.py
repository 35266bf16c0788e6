"""The engines that the V2 tests look at: three processes, each started once, and only where a test asks for it."""

from __future__ import annotations

import pytest

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
            {"options": OPTIONS | saguaro(), "start_up": True, "scenarios": ours},
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


@pytest.fixture(scope="session")
def sampled() -> V2Run:
    """Samples over a small vocabulary, and what planted errors make of them; async."""
    made_up = {"candidates": v2_plans.CANDIDATES}
    planted = ("unmarked", "marked one late")
    (run,) = run_v2(
        [
            {
                "options": OPTIONS | {"max_num_seqs": 32} | saguaro(num_speculative_tokens=3),
                "async": True,
                "scenarios": [
                    v2_plans.samples("drawn", 96, script="drawn", **made_up),
                    *(v2_plans.samples(script, 32, script=script, **made_up) for script in ("lie", "stale")),
                    *(v2_plans.samples(plant, 32, script="drawn", plant=plant, **made_up) for plant in planted),
                ],
            }
        ]
    )
    return run
