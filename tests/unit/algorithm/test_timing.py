from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.algorithm.timing import (
    expected_tokens,
    ideal_ratio,
    speed_up_of_plain_speculation,
    speed_up_over_plain,
)

rates = st.floats(0.0, 1.0)
times = st.floats(0.0, 3.0)
tokens = st.floats(1.0, 8.0)


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


@given(rates, times, tokens)
def test_never_slower_than_ordinary_speculation(hit_rate: float, drafting: float, e: float) -> None:
    """Corollary 8: with the same drafter after a hit and after a miss, as long as the round fits 1 + T."""
    ratio = ideal_ratio(drafting, hit_rate=hit_rate, tokens_hit=e, tokens_miss=e, tokens=e)
    assert ratio >= 1 - 1e-9
    if hit_rate > 0.01 and drafting > 0.01:
        assert ratio > 1


@given(rates, st.floats(0.0, 1.0), tokens, tokens)
def test_bounds_of_corollary_9(hit_rate: float, drafting: float, e_hit: float, e: float) -> None:
    ratio = ideal_ratio(drafting, hit_rate=hit_rate, tokens_hit=e_hit, tokens_miss=e_hit, tokens=e)
    lower = (1 + drafting) / (1 + drafting * (1 - hit_rate)) * e_hit / e
    upper = (1 + drafting) * e_hit / e
    assert lower - 1e-9 <= ratio <= upper + 1e-9


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
