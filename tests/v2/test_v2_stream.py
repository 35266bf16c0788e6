"""`placement: stream` under an interpreted runner V2: vLLM's target and draft, and the texts of plain vLLM."""

from __future__ import annotations

import pytest

from tests.e2e.harness import Scenario, run_engines
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, K, Scripted, V2Run, assert_same_arrivals, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine]

Three = tuple[V2Run, V2Run, V2Run]
STREAM = saguaro(placement="stream", branches=8)


@pytest.fixture(scope="module")
def runs() -> Three:
    """Plain vLLM; ours in step with the host; and ours a step behind it, where requests come and go."""
    ragged = OPTIONS | v2_plans.RAGGED
    plain, ours, late = run_v2(
        [
            {
                "options": ragged,
                "scripted": False,
                "scenarios": [v2_plans.ragged("ragged"), v2_plans.greedy("greedy")],
            },
            {
                "options": OPTIONS | STREAM,
                "scripted": False,
                "start_up": True,
                "scenarios": [
                    v2_plans.greedy("greedy"),
                    v2_plans.greedy_among_sampled("among sampled"),
                    v2_plans.greedy("guarded", guarded=True),
                    v2_plans.greedy_among_sampled("guarded, sampled", guarded=True),
                ],
            },
            {
                "options": ragged | saguaro(placement="stream", branches=8, max_model_len=v2_plans.LONGEST_DRAFT),
                "scripted": False,
                "async": True,
                "scenarios": [v2_plans.ragged("ragged"), v2_plans.greedy("greedy")],
            },
        ]
    )
    return plain, ours, late


@pytest.fixture(scope="module")
def on_v1() -> Scenario:
    """The host engine, synchronous: the same target and draft, the same prompts, as many branches."""
    options = OPTIONS | saguaro(placement="inline", branches=8)
    (run,) = run_engines([{"options": options, "scenarios": [v2_plans.greedy("greedy")]}])
    return run["greedy"]


def hit_rate(found: Scripted | Scenario) -> float:
    hits = found.metrics["vllm:saguaro_hits"]
    return hits / (hits + found.metrics["vllm:saguaro_misses{cause=not_predicted}"])


def test_greedy_texts_are_those_of_plain_vllm(runs: Three) -> None:
    plain, ours, late = runs
    assert ours["greedy"].tokens == plain["greedy"].tokens
    assert late["greedy"].tokens == plain["greedy"].tokens
    assert ours["among sampled"].tokens[::2] == plain["greedy"].tokens[::2]


def test_greedy_texts_are_those_of_v1(runs: Three, on_v1: Scenario) -> None:
    """Whose own tests say that they are plain vLLM's there."""
    for found in runs:
        assert found["greedy"].tokens == on_v1.tokens


def test_vllms_calls_at_the_start_leave_nothing_behind(runs: Three) -> None:
    found = runs[1].answer["start_up"]
    assert found["ready untouched"]
    assert found["touched by dummy runs"] == [], "dummy and profile runs are no steps"
    admitted, rounds = found["warm-up"]
    assert admitted > 0, "made-up requests are ordinary ones"
    assert rounds > 0
    assert found["left"] == []
    assert found["blocks left"] == 0
    assert found["captured in a trial"] == 0
    assert found["captured"] == 1
    assert found["alive"]


def test_nothing_waits_on_the_host(runs: Three) -> None:
    _, ours, _ = runs
    assert "synchronised" not in ours.answer
    for name in ("guarded", "guarded, sampled"):
        assert ours[name].guard["propose"] > 10
        assert ours[name].guard["steps"] > 20
    assert ours["guarded"].tokens == ours["greedy"].tokens


def test_outcomes_are_hit_and_their_drafts_accepted_as_on_v1(runs: Three, on_v1: Scenario) -> None:
    _, ours, late = runs
    for found in (ours["greedy"], late["greedy"]):
        assert hit_rate(found) > 0.8 * hit_rate(on_v1) > 0.3
        each = found.accepted / found.metrics["vllm:saguaro_hits"]
        on_host = on_v1.metrics["vllm:spec_decode_num_accepted_tokens"] / on_v1.metrics["vllm:saguaro_hits"]
        assert each == pytest.approx(on_host, rel=0.2)
        assert 0 < each <= K


def test_requests_that_come_and_go_keep_their_texts(runs: Three) -> None:
    plain, _, late = runs
    assert_same_arrivals(late["ragged"], plain["ragged"])
    assert late["ragged"].metrics["vllm:saguaro_hits"] > 0
    assert late["ragged"].metrics["vllm:prefix_cache_hits"] > 0
    assert late["ragged"].metrics["vllm:num_preemptions"] > 0
    assert late.answer["facts"]["async"]
