"""What the target side decides, from numbers that are made up here: no time is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import accumulate
from operator import mul

import pytest

from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.policy import Judged, Policy, Source

K = 4
BASE, PER_TOKEN = 24e-3, 2e-3
"""A pass of the made-up target: 24 ms and 2 ms a token. By the priors (.7 accepted, .8 hits) drafts pay below 28 rows:

    (B + .8 B .7) / (base + 1.8 B t) > B / (base + B t)  where  B < .56 / .24 base / t
"""
LIMIT = 0.56 / 0.24 * BASE / PER_TOKEN


def seconds_of(tokens: int) -> float:
    return BASE + PER_TOKEN * tokens


def informed(policy: Policy, steps: int = 400) -> Policy:
    """Let it see passes of many sizes, each with as many tokens out as in."""
    for i in range(steps):
        tokens = 1 + i * 7 % 50
        policy.observe_step(1, tokens - 1, 0, tokens, seconds_of(tokens), seconds_of(tokens))
    return policy


def serve(policy: Policy, rows: int, steps: int) -> Iterator[int | None]:
    """Steps of an engine with so many requests: the drafts of each row that hit, or None for a step at rest."""
    for i in range(steps):
        if policy.resting(rows):
            policy.observe_step(rows, 0, 0, rows, seconds_of(rows), seconds_of(rows))
            yield None
            continue
        drafts = policy.drafts(rows)
        hits = rows * (6 + i % 5) // 10  # 8 of 10, more or less: the sizes of passes differ
        tokens = rows + hits * drafts
        out = rows + round(hits * sum(0.7 ** (j + 1) for j in range(drafts)))
        policy.observe_step(rows, hits * drafts, 0, out, seconds_of(tokens), seconds_of(tokens))
        yield drafts


def best(reach: list[float], hit_rate: float, rows: int) -> int:
    """The number of drafts with the most tokens a second, by trying all of them."""

    def rate(drafts: int) -> float:
        tokens = rows + rows * hit_rate * sum(reach[:drafts])
        return tokens / (BASE + PER_TOKEN * (rows + rows * hit_rate * drafts))

    return max(range(K + 1), key=lambda drafts: (round(rate(drafts), 9), -drafts))


# ---- what was measured ----------------------------------------------------------------------------------------------


def test_before_anything_is_known_it_goes_by_the_priors() -> None:
    policy = Policy(K, "auto")
    assert policy.reach(Source.CACHE) == pytest.approx([0.7, 0.49, 0.343, 0.2401])
    assert policy.reach(Source.JIT) == pytest.approx([0.7, 0.49, 0.343, 0.2401])
    assert policy.reach(Source.NGRAM) == pytest.approx([0.4, 0.16, 0.064, 0.0256])
    assert policy.hit_rate == pytest.approx(0.8)
    assert not policy.quiet
    assert policy.drafts(1000) == K


def test_each_position_learns_its_own_chance_and_a_rejection_hides_those_after_it() -> None:
    policy = Policy(K, "none")
    for _ in range(2000):
        policy.observe_drafts([Judged(Source.CACHE, 4, 2)])
    first, second, third, fourth = policy.reach(Source.CACHE)
    assert (first, second, third) == pytest.approx((1, 1, 0), abs=1e-3)
    assert fourth == pytest.approx(0.7 * third), "never tried"
    assert policy.reach(Source.JIT) == pytest.approx([0.7, 0.49, 0.343, 0.2401])


def test_drafts_that_the_scheduler_left_out_were_not_rejected() -> None:
    policy = Policy(K, "none")
    policy.observe_drafts([Judged(Source.CACHE, 2, 2)] * 50)
    first, second, third, fourth = policy.reach(Source.CACHE)
    assert min(first, second) > 0.9
    assert (third / second, fourth / third) == pytest.approx((0.7, 0.7))


def test_a_draft_by_hand() -> None:
    policy = Policy(1, "none")
    policy.observe_drafts([Judged(Source.NGRAM, 1, 1)])
    # prior 0.4 of weight 4, which fades by 0.99
    assert policy.reach(Source.NGRAM) == pytest.approx([(0.99 * 4 * 0.4 + 1) / (0.99 * 4 + 1)])


def test_more_drafts_than_k_are_counted_up_to_k() -> None:
    policy = Policy(2, "none")
    policy.observe_drafts([Judged(Source.CACHE, 5, 5)])
    assert len(policy.reach(Source.CACHE)) == 2


def test_the_hit_rate_goes_from_its_prior_to_what_was_found_of_late() -> None:
    policy = Policy(K, "none")
    for hit in (True, True, True, False):
        policy.observe_look_up(hit)
    assert 0.75 < policy.hit_rate < 0.8
    for number in range(4000):
        policy.observe_look_up(hit=number % 4 == 0)
    assert policy.hit_rate == pytest.approx(0.25, abs=0.01)
    for _ in range(4000):
        policy.observe_look_up(hit=True)
    assert policy.hit_rate == pytest.approx(1, abs=0.01)


def test_a_batch_that_changes_does_not_make_drafts_look_dear() -> None:
    """A request costs 0.8 ms and a draft 0.3 ms: at 64 requests those pay, though a line over all tokens denies it."""
    policy, chosen = Policy(K, "none"), []
    for i in range(3000):
        rows = (64, 64, 48, 16, 4, 1)[i // 20 % 6]
        drafts = 0 if policy.resting(rows) else policy.drafts(rows)
        hits = rows // 2
        out = rows + round(hits * sum(0.7**j for j in range(1, drafts + 1)))
        seconds = 0.007 + 0.0008 * rows + 0.0003 * hits * drafts
        policy.observe_step(rows, hits * drafts, 0, out, seconds, seconds)
        for _ in range(hits if drafts else 0):
            policy.observe_look_up(hit=True)
            policy.observe_look_up(hit=False)
        if i > 1500 and rows == 64:
            chosen.append(drafts)
    assert statistics.median(chosen) >= 2, chosen


def test_drafts_of_requests_that_sample_are_verified_only_where_those_pay() -> None:
    """A greedy draft costs 0.02 ms and a sampled one 3 ms."""
    policy = Policy(K, "none")
    for i in range(1200):
        drafts, sampled = i % 3, i // 40 % 2 == 1
        seconds = 0.010 + 16 * drafts * (0.003 if sampled else 0.00002)
        policy.observe_step(16, 16 * drafts, 16 * drafts * sampled, 16, seconds, seconds)
    assert (policy.drafts(16, 0), policy.drafts(16, 16)) == (K, 0)
    assert 0 < policy.drafts(16, 1) < K


def test_the_rate_is_tokens_out_by_the_whole_time_of_a_step() -> None:
    policy = Policy(K, "none")
    for _ in range(500):
        policy.observe_step(2, 6, 0, 5, 0.01, 0.02)
    assert policy.rate == pytest.approx(250, rel=1e-3)
    policy.observe_step(500, None, 0, 500, 9.0, 9.0)  # with prefill: tells nothing
    assert policy.rate == pytest.approx(250, rel=1e-3)


def test_an_unknown_backup_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fast' is none of auto, none, ngram, jit"):
        Policy(K, "fast")


# ---- how many drafts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 12, 16, 20, 24, 40, 80])
def test_it_verifies_what_gives_the_most_tokens_a_second(rows: int) -> None:
    policy = informed(Policy(K, "none"))
    policy.resting(rows)
    expected = best(list(accumulate([0.7] * K, mul)), 0.8, rows)
    assert policy.drafts(rows) == expected
    assert (expected > 0) == (rows < LIMIT)


def test_the_number_falls_from_all_to_none_as_the_batch_grows() -> None:
    chosen = []
    for rows in range(1, 40):
        policy = informed(Policy(K, "none"))
        policy.resting(rows)
        chosen.append(policy.drafts(rows))
    assert chosen == sorted(chosen, reverse=True)
    assert (chosen[0], chosen[-1]) == (K, 0)
    assert set(chosen) >= {0, 1, 2}


def test_bad_drafts_are_not_worth_verifying_where_good_ones_are() -> None:
    good, bad = informed(Policy(K, "none")), informed(Policy(K, "none"))
    for _ in range(500):
        for policy, accepted in ((good, K), (bad, 0)):
            policy.observe_drafts([Judged(Source.CACHE, K, accepted)])
            policy.observe_look_up(hit=True)
    for policy in (good, bad):
        policy.resting(8)
    assert (good.drafts(8), bad.drafts(8)) == (K, 0)


def test_where_it_must_not_choose_it_is_always_all_of_them() -> None:
    policy = informed(Policy(K, "none", adaptive=False))
    assert set(serve(policy, 200, 2000)) == {K}
    assert not policy.quiet


def test_all_drafts_are_verified_now_and_then() -> None:
    """Else nothing would ever be learnt of those that are left out."""
    policy = informed(Policy(K, "none"))
    drafts = list(serve(policy, 16, 640))
    usual = best(list(accumulate([0.7] * K, mul)), 0.8, 16)
    assert 0 < usual < K
    assert [i + 1 for i, n in enumerate(drafts) if n == K] == list(range(64, 641, 64))
    assert set(drafts) == {usual, K}


# ---- going quiet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 16, 24, 26, 30, 32, 64, 500])
def test_it_goes_quiet_exactly_where_drafts_do_not_pay(rows: int) -> None:
    assert (None in serve(Policy(K, "none"), rows, 600)) == (rows > LIMIT)


def test_chance_alone_does_not_make_it_quiet() -> None:
    policy = informed(Policy(K, "none"))
    for _ in range(20):
        assert None not in serve(policy, 100, 15)
        assert all(serve(policy, 4, 2))  # steps that pay between them
    assert None in serve(policy, 100, 17)


def test_the_rests_grow_twice_as_long_each_time_it_still_does_not_pay() -> None:
    policy = informed(Policy(K, "none"))
    steps = list(serve(policy, 100, 40_000))
    assert rests(steps)[:7] == [256, 512, 1024, 2048, 4096, 8192, 8192]


def test_a_rest_that_paid_off_is_followed_by_a_short_one() -> None:
    policy = informed(Policy(K, "none"))
    list(serve(policy, 100, 3000))
    assert next(serve(policy, 20, 1)) is not None, "woken by the small batch"
    assert rests(list(serve(policy, 100, 1000)))[0] == 256


def rests(steps: list[int | None]) -> list[int]:
    """The lengths of the rests, one after the other."""
    lengths = [0]
    for drafts in steps:
        if drafts is None:
            lengths[-1] += 1
        elif lengths[-1]:
            lengths.append(0)
    return lengths if lengths[-1] else lengths[:-1]


def test_after_a_rest_all_drafts_are_tried_before_it_judges_again() -> None:
    policy = informed(Policy(K, "none"))
    steps = list(serve(policy, 100, 16 + 256 + 24 + 10))
    assert steps[:16] == [0] * 16
    assert steps[16 : 16 + 256] == [None] * 256
    assert steps[16 + 256 :] == [K] * 24 + [0] * 10


@pytest.mark.parametrize(("rows", "wakes"), [(51, False), (50, True), (1, True)])
def test_it_comes_back_when_the_batch_has_shrunk_to_half(rows: int, wakes: bool) -> None:
    policy = informed(Policy(K, "none"))
    list(serve(policy, 100, 60))
    assert policy.quiet
    assert policy.resting(rows) is not wakes
    assert policy.quiet is not wakes
    if wakes:
        assert (policy.drafts(rows) > 0) == (rows < LIMIT)


def test_another_draft_side_is_tried_at_once_and_judged_by_itself() -> None:
    """One that hung was late with everything, and the rests had grown long."""
    policy = informed(Policy(K, "none"))
    list(serve(policy, 64, 2000))
    for _ in range(2000):
        policy.observe_look_up(hit=False)
    assert policy.quiet
    assert policy.hit_rate < 0.1
    policy.begin_anew()
    assert not policy.quiet
    assert policy.hit_rate == Policy(K, "none").hit_rate
    steps = list(serve(policy, 64, 400))
    assert steps[:24] == [K] * 24
    assert 256 <= rests(steps)[0] < 400 - 24, "the first rest is a short one"
    assert None not in list(serve(informed(Policy(K, "none")), 4, 400)), "and none where drafts pay"


def test_what_it_says_of_the_next_step_is_what_comes() -> None:
    policy = informed(Policy(K, "none"))
    for _ in range(3000):
        announced = policy.quiet
        (drafts,) = serve(policy, 100, 1)
        assert announced == (drafts is None)


# ---- backups --------------------------------------------------------------------------------------------------------


def test_without_a_backup_a_missed_row_gets_nothing() -> None:
    choice = informed(Policy(K, "none")).back_up([True, False], 0, K)
    assert (choice.rows, choice.ngram_tokens, choice.jit_drafts) == (("none", "none"), 0, 0)


@pytest.mark.parametrize("most", [1, 3, K])
def test_n_grams_serve_the_rows_that_have_a_match_with_all_tokens_that_may_be_verified(most: int) -> None:
    choice = Policy(K, "ngram").back_up([True, False, True], 5, most)
    assert (choice.rows, choice.ngram_tokens, choice.jit_drafts) == (("ngram", "none", "ngram"), most, 0)


@pytest.mark.parametrize("most", [1, 3, K])
def test_just_in_time_serves_all_rows_where_none_has_hit(most: int) -> None:
    policy = Policy(K, "jit")
    choice = policy.back_up([True, False], 0, most)
    assert (choice.rows, choice.jit_drafts) == (("jit", "jit"), most)
    assert policy.back_up([True, False], 1, most).rows == ("none", "none")


def test_it_waits_by_itself_where_the_tokens_are_worth_the_time() -> None:
    cheap, dear = (informed(Policy(K, "auto")) for _ in range(2))
    for depth in (1, 2, 3, 4) * 20:
        cheap.observe_jit(depth, 1e-5 * depth)
        dear.observe_jit(depth, 10.0 * depth)
    rate_of_pass = cheap.rate * PER_TOKEN  # what a token of a pass costs, in tokens
    worth = sum(reach > rate_of_pass for reach in cheap.reach(Source.JIT))
    choice = cheap.back_up([False], 0, K)
    assert (choice.rows, choice.jit_drafts) == (("jit",) if worth else ("none",), worth)
    assert worth > 0
    assert dear.back_up([False], 0, K).rows == ("none",)
    assert cheap.back_up([False], 1, K).rows == ("none",), "a row that hit does not wait"


def test_n_grams_that_are_never_right_are_given_up() -> None:
    policy = informed(Policy(K, "auto"))
    for depth in (1, 2, 3, 4) * 20:
        policy.observe_jit(depth, 10.0 * depth)
    for _ in range(500):
        policy.observe_drafts([Judged(Source.NGRAM, K, K)])
    assert policy.back_up([True, False], 3, K).rows == ("ngram", "none")
    for _ in range(1000):
        policy.observe_drafts([Judged(Source.NGRAM, K, 0)])
    assert policy.back_up([True, False], 3, K).rows == ("none", "none")


def test_until_it_has_waited_it_goes_by_the_time_of_a_round() -> None:
    quick, slow = informed(Policy(K, "auto")), informed(Policy(K, "auto"))
    quick.observe_round(K, (K + 1) * 1e-5)
    slow.observe_round(K, (K + 1) * 10.0)
    assert quick.back_up([False], 0, K).rows == ("jit",)
    assert slow.back_up([False], 0, K).rows == ("none",)
    slow.observe_jit(1, 1e-5)
    slow.observe_jit(K, 1e-5)
    assert slow.back_up([False], 0, K).rows == ("jit",), "what was measured counts, not what was thought"


@pytest.mark.parametrize(("mode", "waits"), [("auto", True), ("jit", True), ("none", False), ("ngram", False)])
def test_whether_the_rest_of_a_late_branch_is_worth_waiting_for(mode: str, waits: bool) -> None:
    policy = Policy(K, mode)
    for _ in range(200):
        policy.observe_step(1, 0, 0, 1, 0.1, 0.1)  # 10 tokens a second
    policy.observe_round(K, (K + 1) * 0.04)
    # a further draft takes 0.04 s, 0.4 tokens; reach is 0.7, 0.49, 0.34, 0.24
    assert policy.more_depths(0, K, 1) == (2 if waits else 0)
    assert policy.more_depths(1, K, 1) == (1 if waits else 0)
    assert policy.more_depths(2, K, 1) == 0
    assert policy.more_depths(0, 1, 1) == (1 if waits else 0)
    # two rows share the wait: 0.2 tokens a draft and row
    assert policy.more_depths(2, K, 2) == (2 if waits else 0)


def late(gained: float, seconds: float, waits: int = 20) -> Policy:
    """A policy that has waited for one more draft so many times; a step takes 0.1 s and gives a token."""
    policy = Policy(K, "auto")
    for _ in range(200):
        policy.observe_step(1, 0, 0, 1, 0.1, 0.1)
    policy.observe_round(K, (K + 1) * 0.04)
    for _ in range(waits):
        policy.observe_late(1, gained, seconds)
        policy.observe_late(K, K * gained, seconds + (K - 1) * 0.01)
    return policy


def test_the_rest_of_late_branches_takes_the_time_that_it_took() -> None:
    """One branch a request takes less than the step over all of them that a round takes."""
    assert late(gained=1.0, seconds=0.01).more_depths(0, K, 1) == K
    assert late(gained=1.0, seconds=0.5).more_depths(0, K, 1) == 0


def test_what_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    assert late(gained=0.0, seconds=0.01).more_depths(0, K, 1) == 0


def test_what_did_not_pay_is_tried_again_now_and_then() -> None:
    """And believed: times that are known only from trying would never change."""
    policy = late(gained=0.0, seconds=0.01)
    tried = 0
    for _ in range(640):
        policy.resting(1)
        more = policy.more_depths(0, K, 1)
        assert more in (0, 1)
        assert policy.more_depths(K, K, 1) == 0
        tried += more
    assert tried == 10
    for _ in range(40):
        policy.observe_late(1, 1.0, 0.01)
    assert policy.more_depths(0, K, 1) > 1
    tried = sum(policy.back_up([False], 0, K).jit_drafts for _ in range(640) if not policy.resting(1))
    assert tried == 10 or policy.back_up([False], 0, K).jit_drafts > 0


def test_patience_is_a_few_times_the_usual_but_no_more_than_a_step() -> None:
    policy = Policy(K, "jit")
    for _ in range(500):
        policy.observe_step(1, 0, 0, 1, 0.1, 0.1)
    for _ in range(100):
        policy.observe_jit(1, 0.002)
        policy.observe_jit(2, 0.003)
    assert 0.003 < policy.patience(2) < 0.1
    assert policy.patience(1) < policy.patience(2) < policy.patience(4)
    slow = Policy(K, "jit")
    for depth in (1, 2) * 100:
        slow.observe_step(1, 0, 0, 1, 0.1, 0.1)
        slow.observe_jit(depth, 3.0 * depth)
    assert slow.patience(1) == slow.patience(K) == pytest.approx(0.1, rel=1e-3)


def test_nothing_that_it_says_is_without_end() -> None:
    policy = Policy(K, "auto")
    assert all(math.isfinite(policy.patience(depth)) for depth in range(1, K + 1))
    assert 0 <= policy.patience(K) < 1


# ---- what was measured before the start -----------------------------------------------------------------------------


def priors(acceptance: float, hit_rate: float = 0.9) -> Priors:
    return Priors((BASE, PER_TOKEN), (0.001, 0.0), 0.001, (acceptance,), ((1, 0.5), (12, hit_rate)))


def test_the_first_step_verifies_what_measured_passes_say() -> None:
    """Without them all drafts are verified until a pass was seen."""
    assert Policy(K, "none").drafts(4 * int(LIMIT)) == K
    assert Policy(K, "none", priors=priors(0.7, 0.8), branches=12).drafts(4 * int(LIMIT)) == 0
    policy = Policy(K, "none", priors=priors(0.5), branches=12)
    assert policy.drafts(8) == best(policy.reach(Source.CACHE), 0.9, 8)


def test_measured_rates_are_where_it_begins() -> None:
    policy = Policy(K, "none", priors=priors(0.5), branches=12)
    assert policy.hit_rate == pytest.approx(0.9)
    assert policy.reach(Source.CACHE) == pytest.approx([0.5**j for j in range(1, K + 1)])
    assert policy.reach(Source.JIT) == policy.reach(Source.CACHE)
    assert policy.verify_pass == pytest.approx(BASE + PER_TOKEN)
    assert policy.rate == pytest.approx(1 / seconds_of(1))
    assert Policy(K, "none", priors=priors(0.5), branches=4).hit_rate == 0.5


def test_what_is_seen_later_counts_more_than_what_was_measured() -> None:
    policy = Policy(K, "none", priors=priors(0.9), branches=12)
    for _ in range(600):
        policy.observe_drafts([Judged(Source.CACHE, K, 0)])
        policy.observe_look_up(hit=False)
        policy.observe_step(1, 0, 0, 1, 0.5, 0.5)
    assert policy.reach(Source.CACHE)[0] < 0.05
    assert policy.hit_rate < 0.1
    assert policy.verify_pass == pytest.approx(0.5, rel=0.1)


def test_another_draft_side_begins_with_the_measured_hit_rate() -> None:
    policy = Policy(K, "none", priors=priors(0.9, 0.95), branches=12)
    for _ in range(300):
        policy.observe_look_up(hit=False)
    policy.begin_anew()
    assert policy.hit_rate == pytest.approx(0.95)
