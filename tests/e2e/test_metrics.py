"""`LLM.get_metrics()` has vLLM's counts of speculation and ours beside them, and they agree."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Inline, Process
from tests.e2e.harness import EngineRun, Scenario

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CAUSES = ("not_predicted", "late", "absent")
HISTOGRAMS = ("draft_round", "target_wait", "verify")


@pytest.fixture(params=["inline", "process"])
def run(request: pytest.FixtureRequest) -> EngineRun:
    group: Inline | Process = request.getfixturevalue(request.param)
    return group.default


@pytest.fixture
def scenario(run: EngineRun) -> Scenario:
    return run["greedy, batch 1"]


def test_misses_are_told_apart_by_cause(scenario: Scenario) -> None:
    names = {name for name in scenario.metrics if name.startswith("vllm:saguaro_misses")}
    assert names == {f"vllm:saguaro_misses{{cause={cause}}}" for cause in CAUSES}
    assert scenario.metrics["vllm:saguaro_misses{cause=not_predicted}"] > 0


def test_a_complete_table_is_never_late_inline(inline: Inline) -> None:
    for name in ("greedy, batch 1", "greedy, batch 8"):
        metrics = inline.default[name].metrics
        assert metrics["vllm:saguaro_misses{cause=late}"] == metrics["vllm:saguaro_late_tables"] == 0
        assert metrics["vllm:saguaro_misses{cause=absent}"] == 0


def test_times_are_counted_in_histograms(scenario: Scenario) -> None:
    for name in HISTOGRAMS:
        count = scenario.metrics[f"vllm:saguaro_{name}_seconds:count"]
        total = scenario.metrics[f"vllm:saguaro_{name}_seconds:sum"]
        assert count > 0
        assert 0 < total / count < 1


def test_every_hit_with_a_full_table_has_a_round_time(scenario: Scenario) -> None:
    full = scenario.hits - scenario.metrics["vllm:saguaro_late_tables"]
    assert scenario.metrics["vllm:saguaro_draft_round_seconds:count"] == full


def test_the_target_does_not_wait_for_a_draft_in_a_process(process: Process) -> None:
    metrics = process.default["greedy, batch 1"].metrics
    waited = metrics["vllm:saguaro_target_wait_seconds:sum"] / metrics["vllm:saguaro_target_wait_seconds:count"]
    verify = metrics["vllm:saguaro_verify_seconds:sum"] / metrics["vllm:saguaro_verify_seconds:count"]
    assert waited < verify / 4  # a look-up, about a hundredth; a draft round is of the order of a verify pass


def test_vllms_own_counters_go_on_counting(scenario: Scenario) -> None:
    metrics = scenario.metrics
    drafts = metrics["vllm:spec_decode_num_drafts"]
    accepted = [metrics[f"vllm:spec_decode_num_accepted_tokens_per_pos[{at}]"] for at in range(4)]
    # Rows with drafts are hits, and misses with a backup; the last of a text is not verified any more.
    assert 0 < drafts <= scenario.hits + scenario.backups
    assert drafts <= metrics["vllm:spec_decode_num_draft_tokens"] <= 4 * drafts
    assert sum(accepted) == metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    assert accepted == sorted(accepted, reverse=True)


def test_vllms_log_line_goes_on(run: EngineRun) -> None:
    assert run.log_lines("SpecDecoding metrics")
