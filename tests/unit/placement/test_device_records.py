"""Records of steps: each is told once and in order; what is torn, lost, stale or nonsense is told to nobody."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.device_sides import CPU, GREEDY, SHAPE, HostChannel, SmallTarget, outcomes_of
from vllm_saguaro.algorithm import step_records
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.messages import Admit, Outcome, Release, Stamp, Step
from vllm_saguaro.placement import layout
from vllm_saguaro.placement import records as records_module
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.mailbox import Mailbox
from vllm_saguaro.placement.records import CHECKSUM, DRAFTS, NUMBER, ROWS, SLOT, Records, head_weight, weights

K, STEPS = SHAPE.num_speculative_tokens, SHAPE.device_steps
PROMPT = [3, 1, 4, 1, 5, 9]


class Writer:
    """The device's half, one copy at a time."""

    def __init__(self, memory: bytearray) -> None:
        words = np.frombuffer(memory, np.int64, SHAPE.q_at // 8)[SHAPE.tables_bytes // 8 :]
        self.newest, self.ring = words[:1], words[8:].reshape(STEPS, SHAPE.record_words)

    def record(self, number: int, outcomes: Sequence[Outcome]) -> np.ndarray:
        """As it is copied: the header, and the rows of this step alone."""
        rows = [_row(outcome) for outcome in outcomes]
        body = np.array(rows, np.int64).reshape(-1)
        checksum = np.add.reduce(body * weights(len(body))) + np.array(head_weight(number, len(rows)))
        return np.concatenate([[number, len(rows)], checksum.reshape(1), body])

    def put(self, record: np.ndarray, at: int) -> None:
        self.ring[at % STEPS, : len(record)] = record

    def step(self, number: int, outcomes: Sequence[Outcome]) -> None:
        self.put(self.record(number, outcomes), number)
        self.newest[0] = number


def _row(o: Outcome) -> list[int]:
    drafts = list(o.speculation) + [o.bonus] * (K - len(o.speculation))
    stamp = o.stamp
    return [
        *(stamp.slot, stamp.generation, stamp.round, o.accepted, o.verified, o.bonus, o.length, len(o.speculation)),
        *drafts,
    ]


def outcome(slot: int, number: int) -> Outcome:
    """Another one for every step."""
    drafts = tuple((number + i) % 40 for i in range(number % (K + 1)))
    verified = number % 4
    return Outcome(Stamp(slot, 1, number - 1), number % (verified + 1), number % 40, 10 + number, drafts, verified)


def outcomes(number: int) -> list[Outcome]:
    return [outcome(slot, number) for slot in range(1 + number % SHAPE.slots)]


@pytest.fixture
def memory() -> bytearray:
    return bytearray(SHAPE.total_bytes)


def sides(memory: bytearray) -> tuple[Writer, Mailbox]:
    return Writer(memory), Mailbox(memoryview(memory), SHAPE)


def drained(box: Mailbox) -> list[Step]:
    steps = []
    while box.has_step:
        step = box.receive()
        if step is not None:
            steps.append(step)
    return steps


def test_what_the_device_writes_is_what_the_draft_side_reads() -> None:
    """The device's way of writing a record, by tensors, against this file's."""
    channel = HostChannel()
    draft = MailboxDraft(channel, SHAPE, CPU, TWINS, _log())
    target = SmallTarget(draft)
    for slot in (3, 0, 1):
        target.admit(slot, [slot, *PROMPT])
    writer, box = sides(bytearray(SHAPE.total_bytes))
    for number in range(1, 10):
        channel.work()
        target.step(list(target.texts)[: 1 + number % 3])
        written = np.frombuffer(channel.memory, np.int64, SHAPE.q_at // 8)[SHAPE.tables_bytes // 8 + 8 :]
        theirs = written.reshape(STEPS, -1)[number % STEPS]
        (step,) = channel.take_in()
        ours = writer.record(number, step.outcomes)
        assert np.array_equal(theirs[: len(ours)], ours)
    draft.close()
    del box


def test_records_come_out_once_and_in_order(memory: bytearray) -> None:
    writer, box = sides(memory)
    assert (box.has_step, box.receive(), box.from_device) == (False, None, True)
    for number in range(1, 30):
        writer.step(number, outcomes(number))
        if number % STEPS == 0:
            assert drained(box) == [Step(outcomes=outcomes(n)) for n in range(number - STEPS + 1, number + 1)]
            assert (box.has_step, box.receive()) == (False, None)
    assert box.dropped == 0


def test_nothing_is_there_before_its_number_is(memory: bytearray) -> None:
    writer, box = sides(memory)
    writer.put(writer.record(1, outcomes(1)), 1)
    assert (box.has_step, box.receive()) == (False, None)
    writer.newest[0] = 1
    assert box.receive() == Step(outcomes=outcomes(1))


def test_what_the_host_says_comes_before_what_the_device_did(memory: bytearray) -> None:
    writer, draft = sides(memory)
    target = Mailbox(memoryview(memory), SHAPE)
    admit = Step(admits=[Admit(Stamp(0, 1, 0), GREEDY, (1, 2))])
    target.post(admit)
    writer.step(1, outcomes(1))
    target.post(Step(releases=[Release(Stamp(1, 1, 0))]))
    assert drained(draft) == [admit, Step(releases=[Release(Stamp(1, 1, 0))]), Step(outcomes=outcomes(1))]


def test_a_record_that_came_after_the_look_at_the_ring_waits_for_the_next_look(
    memory: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request may have been posted after that look, too."""
    writer, draft = sides(memory)
    target = Mailbox(memoryview(memory), SHAPE)
    admit = Step(admits=[Admit(Stamp(0, 1, 0), GREEDY, (1, 2))])
    looked = Records.newest.fget  # type: ignore[attr-defined]

    def newest(self: Records) -> int:
        found: int = looked(self)
        if not writer.newest[0]:  # between the look at the records and that at the ring
            writer.step(1, outcomes(1))
            target.post(admit)
        return found

    monkeypatch.setattr(Records, "newest", property(newest))
    assert draft.receive() == admit
    assert draft.receive() == Step(outcomes=outcomes(1))


def test_a_reader_that_was_overtaken_goes_on_with_what_is_there(memory: bytearray) -> None:
    writer, box = sides(memory)
    for number in range(1, 12):
        writer.step(number, outcomes(number))
    assert drained(box) == [Step(outcomes=outcomes(number)) for number in range(12 - STEPS, 12)]
    assert box.dropped == 11 - STEPS
    writer.step(12, outcomes(12))
    assert drained(box) == [Step(outcomes=outcomes(12))]


@pytest.mark.parametrize("newest", [-1, -(2**63), 2**63 - 1, 2**62])
def test_a_number_that_cannot_be_is_none(memory: bytearray, newest: int) -> None:
    writer, box = sides(memory)
    writer.step(1, outcomes(1))
    assert drained(box) == [Step(outcomes=outcomes(1))]
    writer.newest[0] = newest
    assert (box.has_step, box.receive(), box.dropped) == (False, None, 0)
    writer.step(2, outcomes(2))
    assert drained(box) == [Step(outcomes=outcomes(2))]


def test_a_number_that_jumps_loses_no_more_than_what_is_in_between(memory: bytearray) -> None:
    writer, box = sides(memory)
    writer.step(1, outcomes(1))
    drained(box)
    writer.newest[0] = 1 << 40
    assert drained(box) == []
    writer.step(2, outcomes(2))
    assert Step(outcomes=outcomes(2)) in drained(box)
    writer.step(3, outcomes(3))
    assert drained(box) == [Step(outcomes=outcomes(3))]


def test_the_target_side_sees_that_nobody_takes_records(memory: bytearray, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("vllm_saguaro.placement.mailbox.time.monotonic", lambda: now[0])
    writer, draft = sides(memory)
    target = Mailbox(memoryview(memory), SHAPE)
    assert target.stalled_seconds == 0
    writer.step(1, outcomes(1))
    now[0] += 5
    assert target.stalled_seconds == 5
    writer.step(2, outcomes(2))
    now[0] += 1
    assert target.stalled_seconds == 6
    draft.receive()
    assert target.stalled_seconds == 0, "the second is the oldest since this look"
    now[0] += 2
    assert target.stalled_seconds == 2
    drained(draft)
    now[0] += 9
    assert target.stalled_seconds == 0


# ---- torn, altered, nonsense ----------------------------------------------------------------------------------------

WORDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 50))


def check_never_told_otherwise(told: Sequence[Step], written: dict[int, list[Outcome]]) -> None:
    """Each step that came out was written, whole, and none comes twice."""
    whole = [Step(outcomes=step) for step in written.values()]
    for step in told:
        assert step in whole
    assert len({step.outcomes[0].stamp.round for step in told}) == len(told)


def altered_records_are_none(changes: Sequence[tuple[int, int]], memory: bytearray) -> None:
    """Words of a record that are others than those that were written."""
    writer, box = sides(memory)
    record = writer.record(1, outcomes(3))
    other = record.copy()
    for at, word in changes:
        other[at % len(record)] = word
    writer.put(other, 1)
    writer.newest[0] = 1
    told = drained(box)
    if not np.array_equal(other, record):
        assert told == []
        assert box.dropped
    else:
        assert told == [Step(outcomes=outcomes(3))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), WORDS), min_size=1, max_size=3))
def test_altered_records_are_none(changes: list[tuple[int, int]]) -> None:
    altered_records_are_none(changes, bytearray(SHAPE.total_bytes))


def torn_records_are_none(cut: int, ahead: int, early: bool, memory: bytearray) -> None:
    """The device writes the step that comes `ahead` of one that is there, and has come as far as `cut`.

    `early`: its number is seen all the same.
    """
    writer, box = sides(memory)
    for number in range(1, STEPS + 1):
        writer.step(number, outcomes(number))
    written = {number: outcomes(number) for number in range(1, STEPS + 1)}
    number = ahead + STEPS
    fresh = writer.record(number, outcomes(11))
    cut %= len(fresh) + 1
    writer.ring[number % STEPS, :cut] = fresh[:cut]
    if early:
        writer.newest[0], written[number] = number, outcomes(11)
    told = drained(box)
    check_never_told_otherwise(told, written)
    assert len(told) >= STEPS - (ahead if early else 1)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1000), st.integers(1, STEPS), st.booleans())
def test_torn_records_are_none(cut: int, ahead: int, early: bool) -> None:
    torn_records_are_none(cut, ahead, early, bytearray(SHAPE.total_bytes))


def swapped_rows_are_none(first: int, second: int, memory: bytearray) -> None:
    writer, box = sides(memory)
    record = writer.record(1, outcomes(3))
    rows = record[3:].reshape(4, -1)
    rows[[first, second]] = rows[[second, first]]
    writer.put(record, 1)
    writer.newest[0] = 1
    assert bool(drained(box)) == (first == second)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 3), (2, 2)])
def test_swapped_rows_are_none(first: int, second: int, memory: bytearray) -> None:
    swapped_rows_are_none(first, second, memory)


def a_stale_record_is_none(memory: bytearray) -> None:
    """The number of a step was seen before the record: the one before it is in its place."""
    writer, box = sides(memory)
    for number in range(1, STEPS + 1):
        writer.step(number, outcomes(number))
    told = drained(box)
    writer.newest[0] = STEPS + 1
    assert told + drained(box) == [Step(outcomes=outcomes(number)) for number in range(1, STEPS + 1)]


def test_a_stale_record_is_none(memory: bytearray) -> None:
    a_stale_record_is_none(memory)


def nonsense_rows_are_left_out(column: int, value: int, memory: bytearray) -> None:
    """Of a record that is whole: the device itself has put nonsense in one row."""
    writer, box = sides(memory)
    good = [outcome(0, 7), outcome(2, 7)]
    bad = np.array(_row(dataclasses.replace(outcome(1, 7), accepted=1)), np.int64)
    bad[column] = value
    body = np.concatenate([_row(good[0]), bad, _row(good[1])]).astype(np.int64)
    checksum = np.add.reduce(body * weights(len(body))) + np.array(head_weight(1, 3))
    writer.put(np.concatenate([[1, 3], checksum.reshape(1), body]), 1)
    writer.newest[0] = 1
    (step,) = drained(box)
    assert step.outcomes == good


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((0, value) for value in (-1, SHAPE.slots, 2**40, 0)),
        *((1, value) for value in (0, -1, 2**31)),
        *((2, value) for value in (-1, 2**62)),
        *((3, value) for value in (-1, 4, 2**40)),
        *((4, value) for value in (-1, 0, 4, 2**40)),
        *((5, value) for value in (-1, 40, 2**40)),
        *((6, value) for value in (-1, 2**31)),
        *((7, value) for value in (-1, 4, 2**40)),
        *((8, value) for value in (-1, 40, 2**40)),
    ],
)
def test_nonsense_rows_are_left_out(column: int, value: int, memory: bytearray) -> None:
    nonsense_rows_are_left_out(column, value, memory)


def test_rows_of_nobody_are_no_outcomes_and_no_fault(memory: bytearray) -> None:
    writer, box = sides(memory)
    nobody = dataclasses.replace(outcome(1, 7), stamp=Stamp(1, 0, 0))
    without = dataclasses.replace(outcome(2, 7), accepted=-1)
    writer.step(1, [nobody, outcome(0, 7), without])
    assert drained(box) == [Step(outcomes=[outcome(0, 7)])]
    assert box.dropped == 0


# ---- the checks themselves ------------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A planted error: that word of the header is not looked at."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def sound(self: Records, number: int, record: np.ndarray) -> Step | None:
            count = int(record[ROWS])
            if not 0 < count <= SHAPE.slots:
                return None
            body = record[3 : 3 + count * SHAPE.row_words]
            with np.errstate(over="ignore"):
                checksum = int(np.add.reduce(body * weights(len(body))) + np.int64(head_weight(number, count)))
            if name != "number" and record[NUMBER] != number:
                return None
            if name not in ("checksum", "number") and record[CHECKSUM] != checksum:
                return None
            found = [self._outcome(row) for row in body.reshape(count, -1).tolist() if row[1] > 0 and row[3] >= 0]
            return Step(outcomes=[o for o in found if o is not None])

        patch.setattr(Records, "_sound", sound)

    return plant


def _weightless(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records_module, "weights", lambda count: np.ones(count, np.int64))
    patch.setattr(sys.modules[__name__], "weights", lambda count: np.ones(count, np.int64))


def _takes_any_token(patch: pytest.MonkeyPatch) -> None:
    def lenient(self: Records, row: list[int]) -> Outcome | None:
        stamp = Stamp(row[SLOT], row[1], row[2])
        return Outcome(stamp, row[3], row[5], row[6], tuple(row[DRAFTS : DRAFTS + row[7]]), row[4])

    patch.setattr(Records, "_outcome", lenient)


def _newest_last(patch: pytest.MonkeyPatch) -> None:
    """The records are looked at after the ring."""

    def receive(self: Mailbox) -> Step | None:
        assert self._records is not None
        empty = self._words[0] == self._words[1]
        return self._receive_record(self._records, self._records.newest) if empty else self._receive_frame()

    patch.setattr(Mailbox, "receive", receive)


CHECKS: list[tuple[str, Callable[[pytest.MonkeyPatch], None], Callable[[bytearray], Any]]] = [
    ("checksum", _without("checksum"), lambda memory: altered_records_are_none([(8, 11)], memory)),
    ("checksum", _without("checksum"), lambda memory: torn_records_are_none(12, 1, True, memory)),
    ("number", _without("number"), a_stale_record_is_none),
    ("weights", _weightless, lambda memory: swapped_rows_are_none(0, 1, memory)),
    ("bounds", _takes_any_token, lambda memory: nonsense_rows_are_left_out(5, 40, memory)),
]


@pytest.mark.parametrize(("name", "plant", "check"), CHECKS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_planted_error_is_found(
    name: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[bytearray], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(bytearray(SHAPE.total_bytes))
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(bytearray(SHAPE.total_bytes))


def test_an_order_that_is_planted_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is empty, and then come an admission and its first outcome: the outcome must not be told first."""
    writer, draft = sides(memory := bytearray(SHAPE.total_bytes))
    target = Mailbox(memoryview(memory), SHAPE)
    _newest_last(monkeypatch)
    looked = Records.newest.fget  # type: ignore[attr-defined]

    def newest(self: Records) -> int:
        if not writer.newest[0]:
            target.post(Step(admits=[Admit(Stamp(0, 1, 0), GREEDY, (1, 2))]))
            writer.step(1, outcomes(1))
        found: int = looked(self)
        return found

    monkeypatch.setattr(Records, "newest", property(newest))
    assert draft.receive() == Step(outcomes=outcomes(1)), "the wrong order, which the test above would see"


def _log() -> Any:
    import logging

    return logging.getLogger("test")


def test_lost_records_cost_their_requests_the_drafts_and_nobody_else() -> None:
    channel = HostChannel(max_length=400)
    draft = MailboxDraft(channel, SHAPE, CPU, TWINS, _log())
    target = SmallTarget(draft)
    target.admit(0, PROMPT)
    target.admit(1, PROMPT[1:])
    for _ in range(3):
        channel.work()
        target.step()
    channel.work()
    for _ in range(STEPS + 2):
        target.step([0])
    for _ in range(3):
        channel.work()
        drafts = target.step()
        assert int(drafts.ready[0]) == 0
    assert int(drafts.ready[1])
    target.release(0)
    target.admit(0, PROMPT[2:])
    before = target.hits
    for _ in range(4):
        channel.work()
        target.step()
    assert target.hits > before + 4
    draft.close()


def test_records_are_of_the_rows_that_there_are() -> None:
    channel = HostChannel()
    draft = MailboxDraft(channel, SHAPE, CPU, TWINS, _log())
    for slot in range(4):
        draft.admit(slot, f"r{slot}", PROMPT, GREEDY)
    draft.exchange(outcomes_of([(slot, 0, 1, 7) for slot in range(4)]))
    draft.exchange(outcomes_of([(2, 0, 5, 8)]))
    steps = channel.take_in()
    assert [[o.stamp for o in step.outcomes] for step in steps if step.outcomes] == [
        [Stamp(slot, 1, 0) for slot in range(4)],
        [Stamp(2, 1, 1)],
    ]
    assert torch.equal(draft._step.state[:, 1], torch.tensor([1, 1, 2, 1]))
    draft.close()


def test_the_device_writes_what_the_layout_says() -> None:
    """Its constants are the operations' own: those know nothing of a mailbox."""
    assert (step_records.RECORD_HEADER, step_records.ROW_HEADER) == (layout.RECORD_HEADER, layout.ROW_HEADER)
    assert weights(3).tolist() == [step_records.ROW_WEIGHT * odd for odd in (1, 3, 5)]
