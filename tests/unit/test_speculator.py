from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from tests.unit.speculator_bench import PROMPT, Bench, K, admitted, arrived, outcomes, released
from vllm_saguaro import counters
from vllm_saguaro import speculator as speculator_module
from vllm_saguaro.messages import GONE, Miss, Outcome, Sampling, Stamp, Table
from vllm_saguaro.policy import Policy, Source

# ---- hits and misses ------------------------------------------------------------------------------------------------


def test_a_request_is_admitted_with_its_prompt_before_the_targets_pass() -> None:
    bench = arrived()
    admit = admitted(bench)[0]
    assert (admit.token_ids, admit.sampling, admit.stamp.round) == (tuple(PROMPT), Sampling(0.5), 0)
    assert admit.stamp.generation > 0  # a table that nobody wrote has generation 0


def test_a_hit_hands_over_the_drafts_and_tells_the_draft_side() -> None:
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 30), (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[10, 11, 12]]
    assert outcomes(bench) == [Outcome(stamp, 0, 31, 6, (10, 11, 12), 0)]
    bench.table(stamp.next(), (2, 7))
    assert bench.propose(bench.row("a", 10, 11, 7, verified=3)) == [[0, 1, 2]]
    assert outcomes(bench)[1] == Outcome(stamp.next(), 2, 7, 9, (0, 1, 2), 3)
    assert bench.count() == {"hits": 2}
    assert bench.page.total(counters.DRAFT_ROUND) == pytest.approx(0.006)
    assert bench.asked == []


@pytest.mark.parametrize("outcome", [(30,), (10, 31), (31, 31)])
def test_an_outcome_that_was_not_predicted_is_a_miss(outcome: tuple[int, ...]) -> None:
    bench = arrived()
    bench.table(admitted(bench)[0].stamp, (0, 31), (2, 30))
    assert bench.propose(bench.row("a", *outcome)) == [[]]
    assert outcomes(bench)[0].speculation == ()
    assert bench.count() == {"not_predicted": 1}


def test_without_a_table_yet_the_miss_is_late() -> None:
    bench = arrived()
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.count() == {"late": 1}


def test_a_table_without_any_depth_yet_is_late() -> None:
    bench = arrived()
    bench.table(admitted(bench)[0].stamp, (0, 31), depth=0)
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.count() == {"late": 1}


def test_an_unfinished_table_is_a_shorter_hit_and_counted() -> None:
    bench = arrived()
    bench.table(admitted(bench)[0].stamp, (0, 31), depth=2)
    assert bench.propose(bench.row("a", 31)) == [[0, 1]]
    assert outcomes(bench)[0].speculation == (0, 1)
    assert bench.count() == {"hits": 1, "late tables": 1}
    assert sum(bench.page.bins(counters.DRAFT_ROUND)) == 0  # of finished tables only


@pytest.mark.parametrize(("generation", "round_"), [(0, 1), (0, -1), (1, 0), (-1, 0), (1, -1)])
def test_a_table_of_another_round_or_generation_is_never_served(generation: int, round_: int) -> None:
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    bench.propose(bench.row("a", 31))  # now in round 1
    bench.table(Stamp(stamp.slot, stamp.generation + generation, 1 + round_), (0, 32))
    assert bench.propose(bench.row("a", 32)) == [[]]
    assert bench.count() == {"late": 2}


def test_a_miss_does_not_cost_its_batch_mates_their_hits() -> None:
    bench = arrived(a=PROMPT, b=PROMPT, c=PROMPT)
    stamps = [admit.stamp for admit in admitted(bench)]
    for stamp in stamps:
        bench.table(stamp, (0, 31))
    # Two slots for three requests: the third was not admitted.
    assert len(stamps) == 2
    drafts = bench.propose(bench.row("a", 31), bench.row("c", 31), bench.row("b", 30))
    assert drafts == [[0, 1, 2], [], []]
    assert bench.count() == {"hits": 1, "not_predicted": 1, "absent": 1}


# ---- C --------------------------------------------------------------------------------------------------------------


def test_c_is_that_of_the_draft_side_as_of_each_step() -> None:
    bench = arrived()
    assert math.isnan(bench.page.value(counters.SAMPLING_C))
    bench.channel.sampling_c = 0.5
    bench.speculator.begin_step([], [])
    assert bench.page.value(counters.SAMPLING_C) == 0.5
    bench.channel.sampling_c = None
    bench.speculator.begin_step([], [])
    assert math.isnan(bench.page.value(counters.SAMPLING_C))


# ---- rows that are no outcome ---------------------------------------------------------------------------------------


def test_a_piece_of_a_prompt_gets_no_drafts_and_is_no_outcome() -> None:
    bench = arrived()
    bench.table(admitted(bench)[0].stamp, (0, 31))
    steps = len(bench.channel.steps)
    assert bench.propose(bench.row("a")) == [[]]
    assert len(bench.channel.steps) == steps
    assert bench.count() == {}
    assert bench.propose(bench.row("a", 31)) == [[0, 1, 2]]


def test_an_empty_batch_is_nothing() -> None:
    bench = Bench()
    assert bench.propose() == []
    bench.speculator.begin_step([], [])
    assert bench.channel.steps == []


# ---- learning anew --------------------------------------------------------------------------------------------------


def test_an_unknown_request_is_learnt_with_its_tokens() -> None:
    bench = Bench()
    bench.texts["a"] = list(PROMPT)
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.count() == {"absent": 1}
    admit = admitted(bench)[0]
    assert (admit.token_ids, admit.sampling) == ((*PROMPT, 31), Sampling(0.25, top_k=7))
    bench.table(admit.stamp, (0, 32))
    assert bench.propose(bench.row("a", 32)) == [[0, 1, 2]]


def test_a_request_whose_length_disagrees_is_learnt_anew_under_a_new_generation() -> None:
    bench = arrived()
    old = admitted(bench)[0].stamp
    bench.table(old, (0, 31))
    bench.texts["a"] += [8, 9]
    assert bench.propose(bench.row("a", 31)) == [[]]
    new = admitted(bench)[1]
    assert new.token_ids == (*PROMPT, 8, 9, 31)
    assert (new.stamp.slot, new.stamp.round) == (old.slot, 0)
    assert new.stamp.generation > old.generation
    assert bench.propose(bench.row("a", 31)) == [[]]  # the old table is of no use
    assert outcomes(bench)[0].stamp == new.stamp
    assert bench.count() == {"absent": 1, "late": 1}


def test_an_id_that_is_used_again_is_another_request() -> None:
    bench = arrived()
    old = admitted(bench)[0].stamp
    bench.arrive("a", [9, 9])
    new = admitted(bench)[1]
    assert new.token_ids == (9, 9)
    assert new.stamp != old
    assert released(bench) == [old]
    bench.table(old, (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[]]


def test_a_request_that_left_frees_its_slot_for_another_generation() -> None:
    bench = Bench(slots=1)
    bench.arrive("a")
    stamp = admitted(bench)[0].stamp
    bench.speculator.begin_step([], ["a", "never seen"])
    assert [release.stamp for release in bench.channel.steps[-1].releases] == [stamp]
    bench.arrive("b")
    assert admitted(bench)[1].stamp == Stamp(stamp.slot, stamp.generation + 1, 0)


def test_more_requests_than_slots_take_their_turn_when_one_leaves() -> None:
    bench = arrived(a=PROMPT, b=PROMPT, c=PROMPT)
    assert len(admitted(bench)) == 2
    assert bench.propose(bench.row("c", 31)) == [[]]
    bench.speculator.begin_step([], ["a"])
    bench.propose(bench.row("c", 32))
    admit = admitted(bench)[2]
    assert admit.token_ids == (*PROMPT, 31, 32)
    bench.table(admit.stamp, (0, 33))
    assert bench.propose(bench.row("c", 33)) == [[0, 1, 2]]


def test_a_request_without_a_slot_is_not_read_in_vain() -> None:
    """A copy of the whole text a step, for nothing, where there are more requests than slots."""
    bench = arrived(a=PROMPT, b=PROMPT, c=PROMPT)
    for token in (31, 32, 33):
        bench.propose(bench.row("c", token))
    assert bench.asked == []


# ---- too long -------------------------------------------------------------------------------------------------------


def test_a_text_too_long_for_the_draft_is_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    bench = arrived(long=[1] * 38, a=PROMPT)
    assert [list(admit.token_ids) for admit in admitted(bench)] == [PROMPT]
    bench.table(admitted(bench)[0].stamp, (0, 31))
    assert bench.propose(bench.row("long", 5), bench.row("a", 31)) == [[], [0, 1, 2]]
    bench.propose(bench.row("long", 5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "long" in caplog.text
    assert "40" in caplog.text
    assert bench.asked == []


def test_a_text_that_outgrows_the_draft_goes_on_without_and_frees_its_slot(caplog: pytest.LogCaptureFixture) -> None:
    bench = arrived(a=[1] * 34, b=PROMPT)
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[0, 1, 2]]  # 35 tokens, K drafts and the bonus token: 39
    bench.table(stamp.next(), (1, 5))
    assert bench.propose(bench.row("a", 0, 5), bench.row("b", 9)) == [[], []]  # 37 tokens: 41
    assert [release.stamp for release in bench.channel.steps[-1].releases] == [stamp.next()]
    bench.propose(bench.row("a", 6))
    assert len(caplog.records) == 1
    bench.arrive("c")
    assert admitted(bench)[-1].stamp.slot == stamp.slot


def test_an_id_left_out_once_may_come_again_with_a_short_text() -> None:
    bench = arrived(a=[1] * 38)
    bench.speculator.begin_step([], ["a"])
    bench.arrive("a", PROMPT)
    assert len(admitted(bench)) == 1


# ---- when the draft side does not answer ----------------------------------------------------------------------------


def test_a_step_that_was_not_taken_is_made_good_by_learning_anew() -> None:
    bench = arrived(a=PROMPT, b=PROMPT)
    stamps = [admit.stamp for admit in admitted(bench)]
    for stamp in stamps:
        bench.table(stamp, (0, 31))
    bench.channel.taking = False
    assert bench.propose(bench.row("a", 31)) == [[0, 1, 2]]  # the drafts are valid whoever knows of them
    bench.channel.taking = True
    assert bench.propose(bench.row("a", 0, 1, 5), bench.row("b", 31)) == [[], [0, 1, 2]]
    new = admitted(bench)[-1]
    assert new.token_ids == (*PROMPT, 31, 0, 1, 5)
    assert new.stamp not in stamps
    bench.table(new.stamp, (0, 6))
    assert bench.propose(bench.row("a", 6)) == [[0, 1, 2]]


def test_an_admission_that_was_not_taken_is_tried_again() -> None:
    bench = Bench(slots=1)
    bench.channel.taking = False
    bench.arrive("a")
    bench.channel.taking = True
    bench.propose(bench.row("a", 31))
    assert admitted(bench)[0].token_ids == (*PROMPT, 31)


def test_after_many_refused_steps_no_slot_is_lost_or_given_twice() -> None:
    bench = Bench(slots=2)
    for i in range(6):
        bench.channel.taking = i % 2 == 0
        bench.arrive("a")
        bench.arrive("b")
        bench.propose(bench.row("a", 1), bench.row("b", 2))
        bench.speculator.begin_step([], ["a"])
    bench.channel.taking = True
    bench.speculator.begin_step([], ["a", "b"])
    bench.arrive("x")
    bench.arrive("y")
    slots = [admit.stamp.slot for admit in admitted(bench)[-2:]]
    assert sorted(slots) == [0, 1]
    stamps = [admit.stamp for admit in admitted(bench)]
    assert len(set(stamps)) == len(stamps)


def test_with_the_draft_side_gone_all_go_on_without_drafts() -> None:
    bench = arrived(a=PROMPT, b=PROMPT)
    for admit in admitted(bench):
        bench.table(admit.stamp, (0, 31))
    bench.channel.alive = False
    for token in (31, 32, 33):
        assert bench.propose(bench.row("a", token), bench.row("b", token)) == [[], []]
        bench.speculator.begin_step([], [])
    bench.arrive("c")
    assert bench.propose(bench.row("c", 3)) == [[]]
    assert bench.count() == {"absent": 7}
    assert bench.asked == []


def test_where_no_draft_side_was_there_yet_no_request_counts_as_too_long(caplog: pytest.LogCaptureFixture) -> None:
    """How much it can hold is not known, either: a pool may have had no room for this engine so far."""
    bench = Bench()
    bench.channel.alive, bench.channel.max_length = False, 0
    bench.speculator._notice_lives()
    bench.arrive("a")
    assert bench.propose(bench.row("a", 31)) == [[]]
    bench.channel.alive, bench.channel.life, bench.channel.max_length = True, 2, 64
    bench.propose(bench.row("a", 32))
    assert [admit.token_ids for admit in admitted(bench)] == [(*PROMPT, 31, 32)]
    assert "longer than the draft" not in caplog.text


# ---- one life of the draft side after the other ---------------------------------------------------------------------


def test_all_requests_are_forgotten_with_the_life_that_knew_them_and_told_to_the_next_one() -> None:
    bench = arrived(a=PROMPT, b=PROMPT)
    before = [admit.stamp for admit in admitted(bench)]
    bench.channel.alive = False
    bench.propose(bench.row("a", 31), bench.row("b", 31))
    assert bench.speculator._slots.free != []
    told = len(bench.channel.steps)
    bench.channel.alive, bench.channel.life = True, 2
    bench.propose(bench.row("a", 32), bench.row("b", 33))
    after = admitted(bench)[2:]
    assert sorted(admit.token_ids[5:] for admit in after) == [(31, 32), (31, 33)]
    assert not {admit.stamp for admit in after} & set(before)
    assert [step for step in bench.channel.steps[told:] if step.outcomes or step.releases] == []
    for admit in after:
        bench.table(admit.stamp, (0, 34))
    assert bench.propose(bench.row("a", 34), bench.row("b", 34)) == [[0, 1, 2], [0, 1, 2]]


def test_a_life_that_ended_and_was_followed_between_two_looks_is_noticed_as_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the new life may have heard of the old one's requests it is told to forget."""
    caplog.set_level("INFO")
    bench = arrived()
    before = admitted(bench)[0].stamp
    bench.table(before, (0, 31))
    bench.channel.life = 2
    assert bench.propose(bench.row("a", 31)) == [[]], "a table of before"
    assert bench.count() == {"absent": 1}
    assert released(bench) == [before]
    assert admitted(bench)[1].token_ids == (*PROMPT, 31)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_each_return_has_one_line_and_the_end_is_told_by_what_starts_it_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench = arrived()
    for life in (2, 3):
        bench.channel.alive = False
        for token in (31, 32):
            bench.propose(bench.row("a", token))
            bench.speculator.begin_step([], [])
        bench.channel.alive, bench.channel.life = True, life
        for token in (33, 34):
            bench.speculator.begin_step([], [])
            bench.propose(bench.row("a", token))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("is back" in line for line in lines)


def test_a_draft_side_that_comes_back_is_not_told_of_what_only_the_one_before_knew() -> None:
    bench = arrived(a=PROMPT, b=PROMPT)
    bench.channel.taking = False
    bench.speculator.begin_step([], ["a"])  # the release is refused, and is to be said again
    bench.channel.alive = False
    bench.propose(bench.row("b", 31))
    bench.channel.alive, bench.channel.taking, bench.channel.life = True, True, 2
    bench.speculator.begin_step([], [])
    assert released(bench) == []
    bench.propose(bench.row("b", 32))
    assert admitted(bench)[-1].token_ids == (*PROMPT, 31, 32), "and its refusals are not held against the new one"


def test_the_policy_judges_a_new_draft_side_by_itself() -> None:
    """A draft side that hung was late with everything; that must not keep the next one from being used."""
    bench = arrived(Policy(K, "none"))
    prior = bench.policy.hit_rate
    for token in (31, 32, 33):
        bench.propose(bench.row("a", token))
    low = bench.policy.hit_rate
    assert low < prior
    bench.channel.alive = False
    bench.speculator.begin_step([], [])
    assert bench.policy.hit_rate == low, "there is nothing to judge yet"
    bench.channel.alive, bench.channel.life = True, 2
    bench.speculator.begin_step([], [])
    assert bench.policy.hit_rate == prior


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([10, 10, 10, 10], ["abc", "d"]),
        ([200, 10, 25, 100], ["bc", "d", "a"]),  # a single text may be longer than that
        ([30, 31], ["a", "b"]),
    ],
)
def test_running_requests_are_told_anew_a_few_tokens_a_step(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: list[str]
) -> None:
    monkeypatch.setattr(speculator_module, "_TOLD_ANEW", 40)
    bench = Bench(slots=16)
    bench.channel.max_length = 1000
    bench.texts = {name: [1] * length for name, length in zip("abcd", lengths, strict=False)}
    told = []
    for _ in range(len(lengths) + 1):
        before = len(bench.asked)
        bench.propose(*(bench.row(name, 1) for name in bench.texts))
        told.append("".join(bench.asked[before:]))
    assert [names for names in told if names] == expected
    assert len(admitted(bench)) == len(bench.asked), "no text is copied before its turn"


def test_requests_that_arrive_are_told_at_once_however_much_is_to_be_told_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculator_module, "_TOLD_ANEW", 10)
    bench = Bench(slots=16)
    bench.texts = {f"r{i}": [1] * 8 for i in range(4)}
    bench.propose(*(bench.row(name, 31) for name in list(bench.texts)))
    assert len(admitted(bench)) == 1
    bench.arrive("new", [5] * 30)
    assert admitted(bench)[-1].token_ids == (5,) * 30


def test_a_request_that_was_given_up_is_told_anew_after_a_while_each_time_twice_as_long() -> None:
    """Something of it may have been lost on the way; or it has a token that the draft does not know, and never will."""
    bench = arrived()
    at = []
    for step in range(70):
        stamp = admitted(bench)[-1].stamp
        bench.channel.tables[stamp.slot] = Table(stamp.gone(), [], [], [])
        bench.texts["a"] = list(PROMPT)
        before = len(admitted(bench))
        bench.propose(bench.row("a", 31))
        bench.speculator._requests["a"].length = len(PROMPT)
        at += [step] * (len(admitted(bench)) - before)
    gaps = [after - before for before, after in pairwise([0, *at])]
    assert gaps == [8, 16, 32]
    bench.speculator.begin_step([], ["a"])
    bench.arrive("a")
    assert bench.speculator._given_up == {}


def given_up(bench: Bench, request_id: str) -> None:
    """The draft side says that it does not have this request."""
    stamp = bench.speculator._requests[request_id].stamp
    bench.channel.tables[stamp.slot] = Table(stamp.gone(), [], [], [])


def test_a_request_that_was_given_up_is_not_told_anew_while_it_has_drafts_under_verification() -> None:
    """They would be no part of what is told, and the outcome that follows would not fit it."""
    bench = arrived(Policy(K, "ngram", adaptive=False))
    bench.guesses["a"] = [8]
    for _ in range(20):
        given_up(bench, "a")
        assert bench.propose(bench.row("a", 31)) == [[8]]
    assert len(admitted(bench)) == 1
    bench.guesses = {}
    given_up(bench, "a")
    bench.propose(bench.row("a", 31))
    assert len(admitted(bench)) == 2
    bench.table(admitted(bench)[1].stamp, (0, 32))
    assert bench.propose(bench.row("a", 32)) == [[0, 1, 2]]


def test_a_request_whose_turn_has_not_come_does_not_wait_twice_as_long_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculator_module, "_TOLD_ANEW", 40)
    bench = arrived(a=PROMPT, b=PROMPT)
    for _ in range(8):
        for name in "ab":
            given_up(bench, name)
        bench.propose(bench.row("a", 31), bench.row("b", 31))
    told = [len(admitted(bench))]
    for _ in range(3):
        for name in "ab":
            given_up(bench, name)
        bench.texts = {"a": [1] * 25, "b": [1] * 26}
        for name, request in bench.speculator._requests.items():
            request.length = len(bench.texts[name])
        bench.propose(bench.row("a", 31), bench.row("b", 31))
        told.append(len(admitted(bench)))
    assert told == [2, 3, 4, 4]


# ---- times ----------------------------------------------------------------------------------------------------------


def test_the_time_between_two_steps_is_a_verify_pass() -> None:
    bench = arrived()
    bench.propose(bench.row("a", 31))
    assert sum(bench.page.bins(counters.VERIFY)) == 0
    bench.speculator.begin_step([], [])
    bench.propose(bench.row("a", 32))
    assert sum(bench.page.bins(counters.VERIFY)) == 1
    assert sum(bench.page.bins(counters.TARGET_WAIT)) == 2
    assert 0 < bench.page.total(counters.VERIFY) < 1


def test_a_pause_between_requests_is_no_verify_pass() -> None:
    bench = arrived()
    bench.propose(bench.row("a", 31))
    bench.speculator.begin_step([], ["a"])
    bench.arrive("b")
    bench.propose(bench.row("b", 31))
    assert sum(bench.page.bins(counters.VERIFY)) == 0


def test_a_schedule_for_k_cuts_what_is_handed_over_and_the_draft_side_hears_of_it() -> None:
    bench = arrived(a=PROMPT)
    (stamp,) = [admit.stamp for admit in admitted(bench)]
    bench.table(stamp, (0, 31))
    assert bench.propose(bench.row("a", 31), most=2) == [[0, 1]]
    assert bench.channel.steps[-1].outcomes[0].speculation == (0, 1)


def test_a_request_that_the_draft_side_gave_up_counts_as_absent() -> None:
    bench = arrived(a=PROMPT)
    (stamp,) = [admit.stamp for admit in admitted(bench)]
    bench.channel.tables[stamp.slot] = Table(dataclasses.replace(stamp, round=GONE), [], [], [])
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.page.value(counters.MISSES[Miss.ABSENT]) == 1


@pytest.mark.parametrize(("most", "expected"), [(None, [0, 1, 2]), (0, []), (1, [0]), (K, [0, 1, 2]), (9, [0, 1, 2])])
def test_the_scheduler_says_how_many_drafts_at_most(most: int | None, expected: list[int]) -> None:
    bench = arrived()
    bench.table(admitted(bench)[0].stamp, (0, 31))
    assert bench.propose(bench.row("a", 31), most=most) == [expected]
    assert outcomes(bench)[0].speculation == tuple(expected)
    assert bench.page.value(counters.DRAFTS) == (K if most is None else min(most, K))
    assert bench.count() == {"hits": 1}  # that it was cut is no fault of the draft side


def test_the_policy_says_how_many_drafts_are_worth_it() -> None:
    class Two(Policy):
        def drafts(self, rows: int, sampled: int = 0) -> int:
            return 2

    bench = arrived(Two(K, "none"))
    bench.table(admitted(bench)[0].stamp, (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[0, 1]]
    assert outcomes(bench)[0].speculation == (0, 1)
    bench.table(admitted(bench)[0].stamp.next(), (0, 32))
    assert bench.propose(bench.row("a", 32), most=1) == [[0]]


def test_the_draft_side_hears_how_many_drafts_were_in_the_pass() -> None:
    """The scheduler may have taken fewer than it was given: a rejection was then not one of those left out."""
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 31))
    bench.propose(bench.row("a", 31, verified=0))
    bench.propose(bench.row("a", 0, 9, verified=2))
    assert [(o.accepted, o.verified) for o in outcomes(bench)] == [(0, 0), (1, 2)]


# ---- q --------------------------------------------------------------------------------------------------------------


def test_the_q_of_a_hit_is_that_of_the_branch_and_of_the_very_table_it_was_found_in() -> None:
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 30), (0, 31), version=8)
    bench.propose(bench.row("a", 31))
    bench.table(stamp.next(), (0, 5), version=10)  # of the round after: it is there before the sampler asks
    found = bench.speculator.proposals("a", 2)
    assert found is not None
    assert found.tokens.tolist() == [[1], [1]]
    assert bench.channel.asked_q == [(stamp, 8, 1, 2)]


def test_there_is_no_q_without_drafts() -> None:
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    assert bench.speculator.proposals("a", 1) is None
    assert bench.speculator.proposals("nobody", 1) is None
    bench.table(stamp, (0, 31))
    bench.propose(bench.row("a", 31))
    bench.propose(bench.row("a", 32))  # a miss: what it had is verified
    assert bench.speculator.proposals("a", 1) is None
    bench.table(stamp.next().next(), (0, 33))
    bench.propose(bench.row("a", 33), most=0)
    assert bench.speculator.proposals("a", 1) is None
    bench.speculator.begin_step([], ["a"])
    assert bench.speculator.proposals("a", 1) is None
    assert bench.channel.asked_q == []


# ---- what the policy hears of ---------------------------------------------------------------------------------------


def test_what_came_of_the_drafts_is_counted_for_their_source() -> None:
    bench = arrived()
    before = {source: bench.policy.reach(source) for source in Source}
    bench.table(admitted(bench)[0].stamp, (0, 31))
    bench.propose(bench.row("a", 31))
    assert bench.policy.reach(Source.CACHE) == before[Source.CACHE], "nothing was verified yet"
    bench.propose(bench.row("a", 0, 9, verified=2))
    after = bench.policy.reach(Source.CACHE)
    assert after[0] > before[Source.CACHE][0]
    assert after[1] / after[0] < before[Source.CACHE][1] / before[Source.CACHE][0]
    assert after[2] / after[1] == pytest.approx(before[Source.CACHE][2] / before[Source.CACHE][1]), "was not tried"
    for source in (Source.JIT, Source.NGRAM):
        assert bench.policy.reach(source) == before[source]


def test_the_hit_rate_is_of_the_requests_that_the_draft_side_has() -> None:
    bench = arrived(a=PROMPT, b=PROMPT, c=PROMPT)
    prior = bench.policy.hit_rate
    bench.propose(bench.row("c", 31))  # no slot: tells nothing of the cache
    assert bench.policy.hit_rate == prior
    bench.table(admitted(bench)[0].stamp, (0, 31))
    bench.propose(bench.row("a", 31))
    higher = bench.policy.hit_rate
    assert higher > prior
    bench.propose(bench.row("b", 31))  # late
    assert bench.policy.hit_rate < higher


def test_only_a_step_that_merely_decodes_tells_of_the_time_of_a_pass() -> None:
    seen: list[tuple[int | None, int, int]] = []
    sampled_now: list[int] = []

    class Listening(Policy):
        def observe_step(
            self, rows: int, drafts: int | None, drawn: int, tokens_out: int, seconds: float, whole: float
        ) -> None:
            assert 0 <= seconds <= whole
            assert rows == 2
            seen.append((drafts, drawn, tokens_out))

        def drafts(self, rows: int, sampled: int = 0) -> int:
            sampled_now.append(sampled)
            return K

    bench = arrived(Listening(K, "none", adaptive=False), a=PROMPT, b=PROMPT)
    bench.propose(bench.row("a", 31), bench.row("b", 31), tokens_in=10)
    assert seen == [], "nothing before it to measure from"
    bench.propose(bench.row("a", 32, 33, greedy=False), bench.row("b", 34, 35, 36), tokens_in=5)
    bench.propose(bench.row("a", 37), bench.row("b"))
    assert seen == [(3, 1, 5), (None, 0, 1)], "of the drafts, those of requests that sample are told apart"
    assert sampled_now == [0, 1, 0]
