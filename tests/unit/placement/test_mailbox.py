from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.strategies import steps_within
from vllm_saguaro.messages import Admit, Release, Sampling, Stamp, Step, Table
from vllm_saguaro.placement.mailbox import DraftState, Mailbox, MailboxShape
from vllm_saguaro.placement.wire import Limits, encode

SHAPE = MailboxShape(slots=3, branches=4, num_speculative_tokens=2, ring_bytes=256, support=3)


WRAPPING = MailboxShape(slots=2, branches=1, num_speculative_tokens=3, ring_bytes=512, support=1)


def mailbox(shape: MailboxShape = SHAPE) -> Mailbox:
    return Mailbox(memoryview(bytearray(shape.total_bytes)), shape)


def step(number: int) -> Step:
    return Step(releases=[Release(Stamp(number % SHAPE.slots, 1, number))])


def published(box: Mailbox, table: Table) -> None:
    """All that the draft side publishes of a table, depth by depth."""
    for depth in range(len(table.drafts) + 1):
        box.publish(Table(table.stamp, table.accepted, table.bonus, table.drafts[:depth], table.seconds))


def found_in(box: Mailbox, slot: int) -> Table:
    """The table in a slot, but for its version."""
    table = box.read(slot)
    assert table is not None
    return dataclasses.replace(table, version=0)


# ---- ring -----------------------------------------------------------------------------------------------------------


def test_an_empty_ring_has_no_step() -> None:
    box = mailbox()
    assert not box.has_step
    assert box.receive() is None
    assert box.dropped == 0


def test_a_full_ring_takes_nothing_and_keeps_what_it_has() -> None:
    box = mailbox()
    count = 0
    while box.post(step(count)):
        count += 1
    assert count == 256 // 40  # a frame of 14 + 16 bytes, its length, and padding to 8
    before = bytes(box._buffer)
    assert not box.post(step(99))
    assert bytes(box._buffer) == before
    assert [box.receive() for _ in range(count)] == [step(i) for i in range(count)]
    assert box.receive() is None
    assert box.post(step(99))


def test_a_step_larger_than_the_ring_is_not_taken() -> None:
    box = mailbox()
    assert not box.post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), tuple(range(64)))]))
    assert not box.has_step


def test_a_step_that_just_fills_the_ring_is_taken() -> None:
    box = mailbox()
    large = Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), tuple(range(46)))])
    assert len(encode(large)) == 256 - 8 - 1  # and padding to 8
    assert not box.post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), tuple(range(47)))]))
    assert box.post(large)
    assert not box.post(Step())
    assert box.receive() == large


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(steps_within(Limits(WRAPPING.slots, 3)), st.integers(0, 3)), min_size=1, max_size=40))
def test_steps_come_out_in_order_however_often_the_ring_wraps(moves: list[tuple[Step, int]]) -> None:
    box = mailbox(WRAPPING)
    waiting: list[Step] = []
    for posted, receipts in moves:
        if box.post(posted):
            waiting.append(posted)
        assert box.has_step == bool(waiting)
        for _ in range(min(receipts, len(waiting))):
            assert box.receive() == waiting.pop(0)
    while waiting:
        assert box.receive() == waiting.pop(0)
    assert box.dropped == 0


def test_a_damaged_step_is_dropped_and_counted_and_the_next_one_read() -> None:
    box = mailbox()
    box.post(step(1))
    box._ring[8] ^= 0xFF  # the magic
    box.post(step(2))
    assert box.receive() is None
    assert box.dropped == 1
    assert box.receive() == step(2)


def test_an_impossible_length_empties_the_ring_and_is_counted() -> None:
    for size in (0, 1 << 20, (1 << 64) - 1):
        box = mailbox()
        box.post(step(1))
        box._ring[:8] = size.to_bytes(8, "little")
        assert box.receive() is None
        assert box.dropped == 1
        assert not box.has_step
        assert box.post(step(2))
        assert box.receive() == step(2)


# ---- tables ---------------------------------------------------------------------------------------------------------

TABLE = Table(Stamp(1, 5, 7), [0, 1, 2], [30, 2**31 - 1, 0], [[4, 5, 6], [7, 8, 9]], 0.125)


def test_a_table_comes_back_as_it_was_and_alone() -> None:
    box = mailbox()
    published(box, TABLE)
    assert found_in(box, 1) == TABLE
    for slot in (0, 2):
        other = box.read(slot)
        assert other is not None
        assert (other.stamp.generation, len(other.bonus), len(other.drafts)) == (0, 0, 0)


def test_the_c_of_the_newest_table_that_has_one_is_told() -> None:
    box = mailbox()
    assert box.sampling_c is None
    box.publish(dataclasses.replace(TABLE, drafts=[], sampling_c=0.5))
    assert box.sampling_c == 0.5
    box.publish(dataclasses.replace(TABLE, stamp=Stamp(0, 1, 0), drafts=[]))
    assert box.sampling_c == 0.5, "a request that is given up, or a greedy one beside it, has none"
    box.publish(dataclasses.replace(TABLE, stamp=Stamp(0, 1, 1), drafts=[], sampling_c=0.0))
    assert box.sampling_c == 0.0
    table = box.read(0)
    assert table is not None
    assert table.sampling_c is None, "it is told of the draft side, not of a table"


def test_a_table_that_nobody_wrote_is_of_no_request() -> None:
    box = mailbox()
    table = box.read(0)
    assert table is not None
    assert table.stamp == Stamp(0, 0, 0)  # generations begin at 1
    assert table.find(0, 0) is None


def test_a_table_is_as_deep_as_it_has_been_published() -> None:
    box = mailbox()
    for depth in range(3):
        box.publish(Table(TABLE.stamp, TABLE.accepted, TABLE.bonus, TABLE.drafts[:depth]))
        found = box.read(1)
        assert found is not None
        assert found.drafts == TABLE.drafts[:depth]
        assert found.speculation(2) == (6, 9)[:depth]


def test_a_new_round_replaces_the_whole_table() -> None:
    box = mailbox()
    published(box, TABLE)
    box.publish(Table(Stamp(1, 5, 8), [2], [1], []))
    table = box.read(1)
    assert table is not None
    assert (table.stamp, table.accepted, table.bonus, table.drafts) == (Stamp(1, 5, 8), [2], [1], [])


def test_the_reader_sees_nothing_while_keys_are_being_replaced() -> None:
    box = mailbox()
    published(box, TABLE)
    seen: list[Table | None] = []

    class Spy(list[int]):
        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            seen.append(box.read(1))
            return 2

    box.publish(Table(Stamp(1, 5, 8), Spy([2, 2]), [1, 2], []))
    assert seen == [None, None]
    assert box.read(1) is not None


@settings(deadline=None)
@given(
    st.integers(1, 2**31 - 1),
    st.integers(0, 2**62),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**31 - 1)), max_size=4),
    st.integers(0, 2),
    st.data(),
)
def test_any_table_comes_back_as_it_was(
    generation: int, round_: int, keys: list[tuple[int, int]], depth: int, data: st.DataObject
) -> None:
    box = mailbox()
    row = st.lists(st.integers(0, 2**31 - 1), min_size=len(keys), max_size=len(keys))
    drafts = [data.draw(row) for _ in range(depth)]
    table = Table(Stamp(2, generation, round_), [k for k, _ in keys], [token for _, token in keys], drafts, 0.25)
    published(box, TABLE)
    published(box, table)
    found = box.read(2)
    assert found is not None
    assert (found.stamp, found.accepted, found.bonus, found.drafts) == (
        table.stamp,
        table.accepted,
        table.bonus,
        table.drafts,
    )
    assert found_in(box, 1) == TABLE


# ---- state ----------------------------------------------------------------------------------------------------------


def test_state_and_sleep_are_seen_by_the_other_side() -> None:
    memory = memoryview(bytearray(SHAPE.total_bytes))
    draft, target = Mailbox(memory, SHAPE), Mailbox(memory, SHAPE)
    assert (target.state, target.max_length, target.asleep) == (DraftState.STARTING, 0, False)
    draft.announce(DraftState.READY, 4096)
    draft.fall_asleep(True)
    assert (target.state, target.max_length, target.asleep) == (DraftState.READY, 4096, True)
    draft.fall_asleep(False)
    assert not target.asleep


def test_a_closed_mailbox_lets_go_of_its_memory() -> None:
    memory = bytearray(SHAPE.total_bytes)
    box = Mailbox(memoryview(memory), SHAPE)
    box.close()
    memory.append(0)  # raises BufferError while anyone holds a view


# ---- steps that wait ------------------------------------------------------------------------------------------------


class Watch:
    """A clock that the test winds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        patch.setattr("vllm_saguaro.placement.mailbox.time", SimpleNamespace(monotonic=lambda: self.now))


def test_the_oldest_step_is_told_how_long_it_waits_from_when_it_was_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, box = Watch(monkeypatch), mailbox()
    assert box.stalled_seconds == 0.0
    box.post(step(1))
    watch.now += 3
    box.post(step(1))
    watch.now += 4
    assert box.stalled_seconds == 7.0
    assert box.receive() is not None
    watch.now += 1
    assert box.stalled_seconds == 0.0, "the second is the oldest since this look"
    watch.now += 2
    assert box.stalled_seconds == 2.0
    assert box.receive() is not None
    assert box.stalled_seconds == 0.0, "nothing waits"
    watch.now += 100
    box.post(step(1))
    watch.now += 1
    assert box.stalled_seconds == 1.0


def test_a_step_that_becomes_the_oldest_unseen_counts_from_the_next_post(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, box = Watch(monkeypatch), mailbox()
    box.post(step(1))
    box.post(step(1))
    watch.now += 5
    box.receive()
    box.post(step(1))
    watch.now += 2
    assert box.stalled_seconds == 2.0


def test_steps_that_find_no_room_do_not_make_the_oldest_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, box = Watch(monkeypatch), mailbox()
    while box.post(step(1)):
        watch.now += 1
    waited = box.stalled_seconds
    assert waited > 1
    watch.now += 5
    assert not box.post(step(1))
    assert box.stalled_seconds == waited + 5
