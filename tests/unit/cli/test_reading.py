"""Shares and rates from the metrics that our own collector writes."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_saguaro import counters
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.reading import read, uses_saguaro
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Miss
from vllm_saguaro.vllm_hooks.metrics import SaguaroCollector

OF_VLLM = """
vllm:generation_tokens_total{{engine="0",model_name="m"}} {tokens}
vllm:num_requests_running{{engine="0",model_name="m"}} 3.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 1.0
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {rounds}
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafts}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="10"}} 0.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {accepted}
"""


def snapshot(page: CounterPage, tokens: int = 0, rounds: int = 0, drafts: int = 0, accepted: int = 0) -> Snapshot:
    registry = CollectorRegistry()
    registry.register(SaguaroCollector(page, "m", "0"))
    vllm = OF_VLLM.format(tokens=tokens, rounds=rounds, drafts=drafts, accepted=accepted)
    return Snapshot(generate_latest(registry).decode() + vllm)


@pytest.fixture
def page() -> CounterPage:
    page = CounterPage()
    page.add(counters.HITS, 60)
    page.add(counters.LATE_TABLES, 15)
    page.add(counters.MISSES[Miss.NOT_PREDICTED], 30)
    page.add(counters.MISSES[Miss.LATE], 10)
    page.add(counters.BACKUPS["ngram"], 4)
    page.add(counters.QUIET_STEPS, 5)
    page.add(counters.DRAFT_RESTARTS, 2)
    page.set(counters.DRAFTS, 3)
    page.set(counters.BRANCHES, 12)
    page.set(counters.DRAFT_UP, 1)
    for seconds in [0.004] * 20:
        page.observe(counters.VERIFY, seconds)
    for seconds in [3e-5] * 98 + [3e-3] * 2:
        page.observe(counters.TARGET_WAIT, seconds)
    return page


def test_since_the_start_there_are_shares_and_no_rates(page: CounterPage) -> None:
    found = read(snapshot(page, tokens=500, rounds=40, drafts=80, accepted=20))
    assert (found.outcomes, found.hit_rate, found.late_share) == (100, 0.6, 0.25)
    assert found.misses == {"not_predicted": 30, "late": 10, "absent": 0}
    assert found.backups == {"ngram": 4, "jit": 0}
    assert (found.acceptance, found.accepted_by_position) == (0.25, [0.5, 0.0])
    assert (found.chosen_k, found.chosen_n) == (3, 12)
    assert (found.drafts_up, found.drafts_left_off, found.restarts) == (1, 0, 2)
    assert (found.running, found.waiting) == (3, 1)
    assert found.verify == pytest.approx(0.004)
    assert found.quiet_share == 0.25
    assert found.target_wait == pytest.approx(3e-5 * 0.98 + 3e-3 * 0.02)
    assert found.target_wait_p99 == 0.005, "the upper bound of its bucket"
    assert (found.seconds, found.tokens_per_second, found.draft_round, found.backup_wait) == (None, None, None, None)


def test_between_two_moments_only_what_is_new_counts(page: CounterPage) -> None:
    before = snapshot(page, tokens=500, rounds=40, drafts=80, accepted=20)
    page.add(counters.HITS, 9)
    page.add(counters.MISSES[Miss.ABSENT], 1)
    page.observe(counters.VERIFY, 0.008)
    page.observe(counters.TARGET_WAIT, 1.5e-5)
    page.set(counters.BRANCHES, 24)
    found = read(snapshot(page, tokens=600, rounds=50, drafts=100, accepted=35), before, 2.0)
    assert (found.tokens_per_second, found.steps_per_second) == (50.0, 0.5)
    assert (found.outcomes, found.hit_rate, found.late_share) == (10, 0.9, 0.0)
    assert found.misses == {"not_predicted": 0, "late": 0, "absent": 1}
    assert (found.acceptance, found.accepted_by_position) == (0.75, [1.5, 0.0])
    assert found.verify == pytest.approx(0.008)
    assert found.target_wait_p99 == 2e-5
    assert (found.restarts, found.chosen_n) == (0, 24)


def test_c_is_there_where_one_is_chosen(page: CounterPage) -> None:
    assert read(snapshot(page)).chosen_c is None
    page.set(counters.SAMPLING_C, 0.0)
    assert read(snapshot(page)).chosen_c == 0.0
    page.set(counters.SAMPLING_C, 0.5)
    assert read(snapshot(page)).chosen_c == 0.5
    page.set(counters.SAMPLING_C, None)
    assert read(snapshot(page)).chosen_c is None


def test_where_nothing_happened_nothing_is_said(page: CounterPage) -> None:
    now = snapshot(page, tokens=500)
    found = read(now, now, 2.0)
    assert found.tokens_per_second == 0.0
    assert (found.hit_rate, found.acceptance, found.late_share, found.verify, found.target_wait_p99) == (None,) * 5


def test_a_server_that_began_anew_counts_from_its_start(page: CounterPage) -> None:
    before = snapshot(page, tokens=500)
    again = CounterPage()
    again.add(counters.HITS, 3)
    found = read(snapshot(again, tokens=20), before, 2.0)
    assert (found.outcomes, found.hit_rate, found.seconds) == (3, 1.0, None)


def test_a_server_without_our_metrics_is_told_from_one_with_them(page: CounterPage) -> None:
    assert uses_saguaro(snapshot(page))
    assert not uses_saguaro(Snapshot(OF_VLLM.format(tokens=1, rounds=1, drafts=1, accepted=1)))
