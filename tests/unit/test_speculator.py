from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import pytest

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import GONE, Admit, Miss, Outcome, Stamp, Step, Table
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.speculator import Speculator, Verified

K = 3
PROMPT = [1, 2, 3, 4, 5]


class FakeChannel:
    """A draft side that remembers what it was told and answers what it was given."""

    max_length = 40
    resident_bytes = 0

    def __init__(self) -> None:
        self.alive = True
        self.taking = True
        self.steps: list[Step] = []
        self.tables: dict[int, Table] = {}

    def post(self, step: Step) -> bool:
        if not self.alive or not self.taking:
            return False
        self.steps.append(step)
        return True

    def read(self, slot: int) -> Table | None:
        return self.tables.get(slot) if self.alive else None

    def wait_until_ready(self) -> None:
        pass

    def close(self) -> None:
        self.alive = False


class Bench:
    """A speculator, its fake draft side, its counters, and the text of each request."""

    def __init__(self, slots: int = 2) -> None:
        self.channel = FakeChannel()
        self.page = CounterPage()
        channel: Channel = self.channel
        self.speculator = Speculator(channel, slots, K, self.page, logging.getLogger("saguaro-test"))
        self.texts: dict[str, list[int]] = {}
        self.asked: list[str] = []
        """Requests whose tokens were asked for."""

    def arrive(self, request_id: str, tokens: Sequence[int] = PROMPT, temperature: float = 0.5) -> None:
        self.texts[request_id] = list(tokens)
        self.speculator.begin_step([(request_id, tokens, temperature)], [])

    def row(self, request_id: str, *sampled: int) -> Verified:
        text = self.texts[request_id]
        text += sampled

        def tokens() -> list[int]:
            self.asked.append(request_id)
            return list(text)

        return Verified(request_id, list(sampled), len(text), tokens, lambda: 0.25)

    def propose(self, *rows: Verified) -> list[list[int]]:
        return self.speculator.propose(rows)

    def table(self, stamp: Stamp, *outcomes: tuple[int, int], depth: int = K) -> None:
        """A table of these outcomes (k, t*); the drafts of branch i are i0, i1, i2."""
        drafts = [[10 * i + d for i in range(len(outcomes))] for d in range(depth)]
        self.channel.tables[stamp.slot] = Table(
            stamp, [k for k, _ in outcomes], [t for _, t in outcomes], drafts, 0.003
        )

    def count(self) -> dict[str, float]:
        found = {cause.value: self.page.value(counter) for cause, counter in counters.MISSES.items()}
        found |= {"hits": self.page.value(counters.HITS), "late tables": self.page.value(counters.LATE_TABLES)}
        return {name: value for name, value in found.items() if value}


def arrived(**texts: Sequence[int]) -> Bench:
    bench = Bench()
    for request_id, tokens in (texts or {"a": PROMPT}).items():
        bench.arrive(request_id, tokens)
    return bench


def admitted(bench: Bench) -> list[Admit]:
    return [admit for step in bench.channel.steps for admit in step.admits]


def outcomes(bench: Bench) -> list[Outcome]:
    return [outcome for step in bench.channel.steps for outcome in step.outcomes]


def next_round(stamp: Stamp) -> Stamp:
    return Stamp(stamp.slot, stamp.generation, stamp.round + 1)


# ---- hits and misses ------------------------------------------------------------------------------------------------


def test_a_request_is_admitted_with_its_prompt_before_the_targets_pass() -> None:
    bench = arrived()
    admit = admitted(bench)[0]
    assert (admit.token_ids, admit.temperature, admit.stamp.round) == (tuple(PROMPT), 0.5, 0)
    assert admit.stamp.generation > 0  # a table that nobody wrote has generation 0


def test_a_hit_hands_over_the_drafts_and_tells_the_draft_side() -> None:
    bench = arrived()
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 30), (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[10, 11, 12]]
    assert outcomes(bench) == [Outcome(stamp, 0, 31, 6, (10, 11, 12))]
    bench.table(next_round(stamp), (2, 7))
    assert bench.propose(bench.row("a", 10, 11, 7)) == [[0, 1, 2]]
    assert outcomes(bench)[1] == Outcome(next_round(stamp), 2, 7, 9, (0, 1, 2))
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
    assert (admit.token_ids, admit.temperature) == ((*PROMPT, 31), 0.25)
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
    assert [release.stamp for step in bench.channel.steps for release in step.releases] == [old]
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
    bench.table(next_round(stamp), (1, 5))
    assert bench.propose(bench.row("a", 0, 5), bench.row("b", 9)) == [[], []]  # 37 tokens: 41
    assert [release.stamp for release in bench.channel.steps[-1].releases] == [next_round(stamp)]
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


def test_with_the_draft_side_gone_all_go_on_without_drafts_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
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
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert bench.asked == []


def test_a_draft_side_that_ends_between_requests_is_told_of_as_well(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.channel.alive = False
    bench.arrive("a")
    for token in (31, 32):
        assert bench.propose(bench.row("a", token)) == [[]]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


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
    assert bench.speculator.propose([bench.row("a", 31)], 2) == [[0, 1]]
    assert bench.channel.steps[-1].outcomes[0].speculation == (0, 1)


def test_a_request_that_the_draft_side_gave_up_counts_as_absent() -> None:
    bench = arrived(a=PROMPT)
    (stamp,) = [admit.stamp for admit in admitted(bench)]
    bench.channel.tables[stamp.slot] = Table(dataclasses.replace(stamp, round=GONE), [], [], [])
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.page.value(counters.MISSES[Miss.ABSENT]) == 1
