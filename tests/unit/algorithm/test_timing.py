from __future__ import annotations

import math
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_saguaro.algorithm.timing import (
    DraftTimes,
    best_branches,
    best_lookahead,
    comes_too_late,
    depth_in_time,
    drafts_worth_verifying,
    expected_tokens,
    first_best,
    ideal_ratio,
    rate_when_waiting,
    speed_up_of_plain_speculation,
    speed_up_over_plain,
)

rates = st.floats(0.0, 1.0)
times = st.floats(0.0, 3.0)
tokens = st.floats(1.0, 8.0)
positive = st.floats(0.01, 3.0)
reaches = st.lists(rates, max_size=8).map(lambda chances: list(accumulate(chances, mul)))

# POC histogram of accepted drafts after a hit, k = 0..7, of Llama-3.1-70B with a 1B draft; reach_j = P(k >= j)
LLAMA_ACCEPTED = [0.130, 0.094, 0.070, 0.058, 0.048, 0.042, 0.035, 0.523]
LLAMA_REACH = [sum(LLAMA_ACCEPTED[j:]) for j in range(1, 8)]
# Qwen3-32B with a 0.6B draft: milliseconds of service, glue and fork, a tree step; tokens per second at each K
QWEN_SERVICE = 0.71
QWEN = DraftTimes(glue=2.83, step_base=2.54)
QWEN_RATES = {4: 210.9, 5: 193.6, 6: 175.3, 7: 158.6}


def constant_acceptance(chance: float, most: int = 7) -> list[float]:
    return [chance**j for j in range(1, most + 1)]


def qwen_rate(num_drafts: int, chance: float, verify: float) -> float:
    """Tokens per second."""
    reach = constant_acceptance(chance)
    return 1e3 * rate_when_waiting(num_drafts, lambda _: verify, QWEN, 1, reach, service=QWEN_SERVICE)


def qwen_acceptance(verify: float) -> float:
    """The acceptance per token that gives the published rate at K = 4, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if qwen_rate(4, middle, verify) < QWEN_RATES[4] else (low, middle)
    return low


def test_expected_tokens() -> None:
    assert expected_tokens([]) == 1
    assert expected_tokens([1, 1, 1]) == 4
    assert expected_tokens([0.5, 0.5]) == 1.75
    # The geometric series, (1 - a^{K+1}) / (1 - a)
    assert expected_tokens([0.8] * 7) == pytest.approx((1 - 0.8**8) / 0.2)


def test_plain_decoding_is_the_unit() -> None:
    assert speed_up_over_plain(0.0, 5.0, 1.0, primary=2.0, backup=0.0) == 1  # every round a miss without drafts
    assert speed_up_of_plain_speculation(1.0, 0.0) == 1


def test_published_llama_rates() -> None:
    """Llama-3.1-70B with a 1B draft, K = 7, 24 branches (a reproduction's logs, batch 1, greedy).

    66.7 tok/s plain, 181.7 with ordinary speculation (5.03 tokens in 27.52 ms, 15.29 of them verifying), 279.8 with
    Saguaro (hit rate .88, 5.68 tokens after a hit, 4.01 after a miss, rounds of 19.43 ms, verify passes of 15.03).
    """
    drafting = 27.52 / 15.29 - 1
    plain_speculation = speed_up_of_plain_speculation(5.03, drafting)
    assert plain_speculation == pytest.approx(181.7 / 66.7, rel=0.05)

    # T_p is not published; it follows from the mean round, .88 T_p + .12 (1 + T_b) = 19.43 / 15.03.
    primary = (19.43 / 15.03 - 0.12 * (1 + drafting)) / 0.88
    saguaro = speed_up_over_plain(0.88, 5.68, 4.01, primary=primary, backup=drafting)
    assert saguaro == pytest.approx(279.8 / 66.7, rel=0.05)
    ratio = ideal_ratio(
        drafting, hit_rate=0.88, primary=primary, backup=drafting, tokens_hit=5.68, tokens_miss=4.01, tokens=5.03
    )
    assert ratio == pytest.approx(saguaro / plain_speculation)
    assert ratio == pytest.approx(1.54, rel=0.05)


def test_published_qwen_rates_fall_with_k_once_the_target_waits() -> None:
    """Qwen3-32B with a 0.6B draft (another reproduction's logs): 210.9, 193.6, 175.3, 158.6 tok/s at K = 4, 5, 6, 7.

    Before the first of the K decode steps, of 2.54 ms each, come 3.54 ms; a verify pass takes 11.5 ms. An acceptance of
    .72, which gives the rate at K = 4, gives the others as well. (Misses are not modelled: all rounds count as hits.)
    """
    published = {4: 210.9, 5: 193.6, 6: 175.3, 7: 158.6}
    verify = 11.5e-3
    for num_drafts, rate in published.items():
        primary = (3.54e-3 + num_drafts * 2.54e-3) / verify
        tokens = expected_tokens([0.72] * num_drafts)
        assert speed_up_over_plain(1.0, tokens, 1.0, primary, backup=0.0) / verify == pytest.approx(rate, rel=0.03)


def test_the_most_that_can_be_had() -> None:
    assert ideal_ratio(0.0) == 1
    assert ideal_ratio(0.6) == pytest.approx(1.6)
    assert ideal_ratio(1.0) == 2
    assert ideal_ratio(2.0) == pytest.approx(1.5)


@settings(deadline=None)
@given(rates, times, tokens)
def test_never_slower_than_ordinary_speculation(hit_rate: float, drafting: float, e: float) -> None:
    """Corollary 8: with the same drafter after a hit and after a miss, as long as the round fits 1 + T."""
    ratio = ideal_ratio(drafting, hit_rate=hit_rate, tokens_hit=e, tokens_miss=e, tokens=e)
    assert ratio >= 1 - 1e-9
    if hit_rate > 0.01 and drafting > 0.01:
        assert ratio > 1


@settings(deadline=None)
@given(rates, st.floats(0.0, 1.0), tokens, tokens)
def test_bounds_of_corollary_9(hit_rate: float, drafting: float, e_hit: float, e: float) -> None:
    ratio = ideal_ratio(drafting, hit_rate=hit_rate, tokens_hit=e_hit, tokens_miss=e_hit, tokens=e)
    lower = (1 + drafting) / (1 + drafting * (1 - hit_rate)) * e_hit / e
    upper = (1 + drafting) * e_hit / e
    assert lower - 1e-9 <= ratio <= upper + 1e-9


@settings(deadline=None)
@given(rates, times, tokens)
def test_a_miss_may_go_without_drafts(hit_rate: float, primary: float, e_hit: float) -> None:
    s = speed_up_over_plain(hit_rate, e_hit, 1.0, primary=primary, backup=0.0)
    expected = (hit_rate * e_hit + 1 - hit_rate) / (hit_rate * max(1.0, primary) + 1 - hit_rate)
    assert s == pytest.approx(expected)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="hit rate"):
        speed_up_over_plain(1.5, 2.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="negative"):
        speed_up_of_plain_speculation(2.0, -0.1)


def test_depth_in_time() -> None:
    draft = DraftTimes(glue=3.0, step_base=1.0, step_per_row=0.1)
    assert draft.step(10) == 2.0
    by_time = {0: 0, 2.9: 0, 3: 0, 4.9: 0, 5: 1, 6.9: 1, 7: 2, 9: 3, 11: 4, 100: 4, math.inf: 4}
    assert {t: depth_in_time(draft, 10, t, most=4) for t in by_time} == by_time
    assert depth_in_time(draft, 30, 9.0, most=4) == 1  # more rows, longer steps
    assert (0.3 - 0.1) / 0.1 < 2
    assert depth_in_time(DraftTimes(0.1, 0.1), 1, 0.3, most=4) == 2
    assert depth_in_time(DraftTimes(3.0, 0.0), 1, 2.9, most=4) == 0
    assert depth_in_time(DraftTimes(3.0, 0.0), 1, 3.0, most=4) == 4
    with pytest.raises(ValueError, match="negative"):
        DraftTimes(1.0, -0.1)


@settings(deadline=None)
@given(positive, positive, st.integers(0, 8), st.integers(0, 8))
def test_a_depth_that_takes_all_the_time_is_in_time(glue: float, step: float, depth: int, most: int) -> None:
    draft = DraftTimes(glue, step)
    assert depth_in_time(draft, 1, glue + depth * step + 1e-9, most) == min(depth, most)
    assert depth_in_time(draft, 1, glue + (depth + 1) * step - 1e-6, most) == min(depth, most)


def test_what_comes_too_late() -> None:
    # An outcome every 10 s: a step of 2 s may begin until 8 are gone, and again when 12.5 are.
    by_elapsed = {0.0: False, 7.9: False, 8.1: True, 10.1: True, 12.4: True, 12.6: False, 100.0: False}
    assert {elapsed: comes_too_late(2.0, 10.0, elapsed) for elapsed in by_elapsed} == by_elapsed
    assert comes_too_late(20.0, 10.0, 0.0), "longer than the whole pass"
    assert not comes_too_late(2.0, 0.0, 0.0), "nothing is known of the pass"


@settings(deadline=None)
@given(positive, positive, positive, st.integers(0, 8))
def test_without_what_comes_too_late_a_round_has_the_depths_that_are_in_time(
    glue: float, step: float, expected: float, most: int
) -> None:
    assume(glue < expected)
    draft = DraftTimes(glue, step)
    assume(min(abs(expected - glue - n * step) for n in range(most + 2)) > 1e-6)
    depth, elapsed = 0, glue
    while depth < most and not comes_too_late(step, expected, elapsed):
        depth, elapsed = depth + 1, elapsed + step
    assert depth == depth_in_time(draft, 1, expected, most)


def test_no_more_branches_than_the_time_allows() -> None:
    hit_rate = {2: 0.5, 4: 0.7, 8: 0.8, 16: 0.9}
    draft = DraftTimes(glue=2.0, step_base=1.0, step_per_row=0.25)
    reach = [0.8, 0.6, 0.4]
    # Steps of 1.5, 2, 3, 5: of 8 time units 6 are left for steps, so depths 3, 3, 2, 1: .5*1.8, .7*1.8, .8*1.4, .9*.8
    assert best_branches(draft, 8.0, 1, 3, reach, hit_rate, [16, 2, 8, 4]) == 4
    # The same with a function; with four requests the steps are 3, 5, 9, 17: depths 2, 1, 0, 0
    assert best_branches(draft, 8.0, 4, 3, reach, hit_rate.__getitem__, list(hit_rate)) == 2
    assert best_branches(draft, 1000.0, 4, 3, reach, hit_rate, list(hit_rate)) == 16
    assert best_branches(draft, 8.0, 1, 1, reach, hit_rate, list(hit_rate)) == 16  # all are in time for one depth
    assert best_branches(draft, 1.0, 1, 3, reach, hit_rate, [16, 2]) == 2  # nothing is in time: equals, so the fewer
    with pytest.raises(ValueError, match=r"empty|no values"):
        best_branches(draft, 1.0, 1, 3, reach, hit_rate, [])


@settings(deadline=None)
@given(positive, positive, times, st.floats(0.0, 30.0), st.integers(1, 4), reaches, st.lists(rates, min_size=9))
def test_best_branches_is_the_best(
    glue: float, base: float, per_row: float, available: float, batch: int, reach: list[float], hits: list[float]
) -> None:
    draft = DraftTimes(glue, base, per_row)
    hit_rate = sorted(hits)[:9]

    def late(branches: int, depth: int) -> float:
        return glue + depth * (base + per_row * branches * batch) - available

    def accepted(branches: int) -> float:
        return hit_rate[branches] * sum(reach[: sum(late(branches, j) <= 0 for j in range(1, 6))])

    assume(all(abs(late(n, j)) > 1e-6 for n in [1, 2, 4, 8] for j in range(1, 6)))  # rounding decides nothing

    chosen = best_branches(draft, available, batch, 5, reach, hit_rate.__getitem__, [1, 2, 4, 8])
    assert accepted(chosen) >= max(accepted(n) for n in [1, 2, 4, 8]) - 1e-6
    assert all(accepted(n) < accepted(chosen) for n in [1, 2, 4, 8] if n < chosen)


def test_published_qwen_lookahead() -> None:
    """K = 4 of the published 4, 5, 6, 7, and rates that fall with K as published.

    One number is fitted, the acceptance (.72), to the rate at K = 4, where 0.71 + 2.83 + 4 * 2.54 = 13.7 ms exceed the
    verify pass of 11.5. Misses are not modelled.
    """
    acceptance = qwen_acceptance(verify=11.5)
    assert 0.70 < acceptance < 0.74
    for num_drafts, published in QWEN_RATES.items():
        predicted = qwen_rate(num_drafts, acceptance, 11.5) / qwen_rate(4, acceptance, 11.5)
        assert predicted == pytest.approx(published / QWEN_RATES[4], rel=0.03)
    reach = constant_acceptance(acceptance)
    assert best_lookahead(lambda _: 11.5, QWEN, 1, reach, service=QWEN_SERVICE, choices=[7, 6, 5, 4]) == 4

    # The published ordinary speculation (K = 6, 141.4) leaves its one-row draft steps less time than a tree step has,
    # and plain decoding (97.4) less than a verify pass of several tokens: the acceptance is a likely one.
    one_row_step = (expected_tokens([acceptance] * 6) / 141.4e-3 - 11.5) / 6
    assert 1.0 < one_row_step < 2.54
    assert 1 / 97.4e-3 < 11.5


def test_published_qwen_lookahead_among_all() -> None:
    """The target waited 7 ms of the 21.3 at K = 7, so its own part of a round, host work included, is 14.3 ms.

    With it K = 4 is the best of all, since that tree still fits; with the bare pass of 11.5 ms, K = 3 would be.
    """
    own = QWEN_SERVICE + QWEN.glue + 7 * QWEN.step_base - 7
    acceptance = qwen_acceptance(own)
    for num_drafts, published in QWEN_RATES.items():
        predicted = qwen_rate(num_drafts, acceptance, own) / qwen_rate(4, acceptance, own)
        assert predicted == pytest.approx(published / QWEN_RATES[4], rel=0.06)
    assert best_lookahead(lambda _: own, QWEN, 1, constant_acceptance(acceptance), service=QWEN_SERVICE) == 4
    assert best_lookahead(lambda _: 11.5, QWEN, 1, constant_acceptance(0.72), service=QWEN_SERVICE) == 3


def test_published_llama_lookahead() -> None:
    """Where acceptance is high the deepest tree that fits is the best; the published run had K = 7."""
    assert 1 + sum(LLAMA_REACH) == pytest.approx(5.68, abs=0.01)  # the published tokens after a hit
    verify = 15.0
    fits = DraftTimes(glue=2.0, step_base=1.8)  # 2 + 7 * 1.8 = 14.6
    assert best_lookahead(lambda _: verify, fits, 24, LLAMA_REACH, hit_rate=0.88) == 7
    # Beyond the histogram: as the last position, .523 / .558 of those that came so far
    longer = [*LLAMA_REACH, *(LLAMA_REACH[-1] * (0.523 / 0.558) ** j for j in range(1, 6))]
    assert best_lookahead(lambda _: verify, fits, 24, longer, hit_rate=0.88) >= 7
    fast = DraftTimes(glue=1.0, step_base=1.0)
    assert best_lookahead(lambda _: verify, fast, 24, longer, hit_rate=0.88) == 12  # 1 + 12 fit
    # Rows cost time: 24 of them make steps of 4.2 ms, and the target would wait
    slow = DraftTimes(glue=2.0, step_base=1.8, step_per_row=0.1)
    assert best_lookahead(lambda _: verify, slow, 24, LLAMA_REACH, hit_rate=0.88) < 7


def test_a_slow_draft_looks_less_far_ahead() -> None:
    reach = constant_acceptance(0.7)
    chosen = [
        best_lookahead(lambda _: 10.0, DraftTimes(1.0, step), 1, reach) for step in (0.5, 1.5, 2.5, 4.0, 8.0, 40.0)
    ]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 7
    assert chosen[1:5] == [6, 3, 2, 1]
    assert chosen[-1] == 0  # a round of 41 for 1.7 tokens: plain decoding, 1 in 10, is faster
    # Verifying that costs by the token stops it too: 1 + .5 in 11, 1.75 in 12, 1.875 in 13, ...
    assert best_lookahead(lambda k: 10.0 + k, DraftTimes(0.0, 0.1), 1, constant_acceptance(0.5)) == 2


def test_rate_when_waiting() -> None:
    draft = DraftTimes(glue=1.0, step_base=2.0, step_per_row=0.5)

    def rate(num_drafts: int, hit_rate: float = 1.0) -> float:
        return rate_when_waiting(
            num_drafts, lambda k: 8.0 + k, draft, 2, [0.5, 0.25, 0.125], service=0.5, hit_rate=hit_rate
        )

    assert rate(0) == 1 / 8
    assert rate(1) == 1.5 / 9  # drafting takes 4.5: the pass counts
    assert rate(3) == 1.875 / 11
    assert rate(2, hit_rate=0.5) == 1.375 / 10
    slow = rate_when_waiting(2, lambda k: 6.0, draft, 2, [0.5, 0.25], service=0.5)
    assert slow == 1.75 / 7.5  # .5 + 1 + 2 * 3
    with pytest.raises(ValueError, match="some time"):
        rate_when_waiting(0, lambda _: 0.0, draft, 1, [])
    with pytest.raises(ValueError, match="up to 2 drafts"):
        best_lookahead(lambda _: 1.0, draft, 1, [0.5, 0.25], choices=[3])


@settings(deadline=None)
@given(positive, times, positive, times, reaches, rates)
def test_best_lookahead_is_the_best(
    base: float, per_token: float, glue: float, step: float, reach: list[float], hit_rate: float
) -> None:
    def rate(num_drafts: int) -> float:
        drafting = glue + num_drafts * step if num_drafts else 0.0
        seconds = max(base + per_token * num_drafts, drafting)
        return (1 + hit_rate * sum(reach[:num_drafts])) / seconds

    chosen = best_lookahead(lambda k: base + per_token * k, DraftTimes(glue, step), 1, reach, hit_rate=hit_rate)
    assert rate(chosen) >= max(rate(k) for k in range(len(reach) + 1)) * (1 - 1e-9)
    assert all(rate(k) < rate(chosen) for k in range(chosen))


def test_drafts_worth_verifying() -> None:
    reach = [0.5, 0.25, 0.125]
    # One request that hit, 10 + tokens: 1 / 11, 1.5 / 12, 1.75 / 13, 1.875 / 14 = .0909, .125, .1346, .1339
    assert drafts_worth_verifying(reach, 1, 1, 11.0, 1.0) == 2
    # 100 of them: 100 / 110, 150 / 210: a full batch goes quiet
    assert drafts_worth_verifying(reach, 100, 100, 110.0, 1.0) == 0
    # Tokens that cost nothing: all; those of nobody: none
    assert drafts_worth_verifying(reach, 3.5, 8, 10.0, 0.0) == 3
    assert drafts_worth_verifying(reach, 0, 8, 10.0, 1.0) == 0
    assert drafts_worth_verifying([], 4, 4, 10.0, 1.0) == 0
    # Equals: 1 / 2 and (1 + .5) / 3
    assert drafts_worth_verifying([0.5], 1, 1, 2.0, 1.0) == 0
    with pytest.raises(ValueError, match="some time"):
        drafts_worth_verifying(reach, 1, 1, 0.0, 0.0)


@settings(deadline=None)
@given(reaches, st.integers(1, 64), rates, positive, times)
def test_drafts_worth_verifying_is_the_best(
    reach: list[float], rows: int, share: float, without: float, per_draft: float
) -> None:
    def rate(k: int) -> float:
        return (rows + share * rows * sum(reach[:k])) / (without + per_draft * share * rows * k)

    chosen = drafts_worth_verifying(reach, share * rows, rows, without, per_draft)
    assert rate(chosen) >= max(rate(k) for k in range(len(reach) + 1)) * (1 - 1e-9)
    assert all(rate(k) < rate(chosen) for k in range(chosen))


def test_first_best() -> None:
    assert first_best([1.0, 3.0, 2.0]) == 1
    assert first_best([-2.0, -1.0, -1.0]) == 1
    assert first_best([0.3, 0.1 + 0.2]) == 0  # rounding
    assert first_best([0.3, 0.3 + 1e-9]) == 1
    with pytest.raises(ValueError, match=r"empty|no values"):
        first_best([])
