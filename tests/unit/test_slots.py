from __future__ import annotations

from collections import Counter

from tests.unit.speculator_bench import FakeChannel
from vllm_saguaro.slots import Slots


class Sharded(FakeChannel):
    """Three draft sides, each with its own life."""

    def __init__(self) -> None:
        super().__init__(slots=10)
        self.shards = (range(4), range(4, 8), range(8, 10))
        self.epochs = [5, 6, 7]

    def epoch(self, slot: int) -> int:
        return next(epoch for shard, epoch in zip(self.shards, self.epochs, strict=True) if slot in shard)


def shard_of(slot: int) -> int:
    return min(slot // 4, 2)


def test_every_slot_is_given_once_and_then_no_more() -> None:
    slots = Slots(FakeChannel(slots=3))
    stamps = [slots.take() for _ in range(4)]
    assert stamps[3] is None
    assert not slots.has_room
    assert {stamp.slot for stamp in stamps if stamp} == {0, 1, 2}
    assert {(stamp.generation, stamp.round) for stamp in stamps if stamp} == {(1, 0)}
    assert slots.free == []
    assert len(slots) == 3


def test_a_slot_that_is_given_back_comes_again_under_another_generation() -> None:
    slots = Slots(FakeChannel(slots=1))
    first = slots.take()
    assert first is not None
    slots.give(first.slot)
    assert slots.has_room
    second = slots.take()
    assert second is not None
    assert (second.slot, second.generation) == (first.slot, first.generation + 1)


def test_requests_go_to_the_draft_side_that_has_the_fewest() -> None:
    slots = Slots(Sharded())
    taken = [stamp for stamp in (slots.take() for _ in range(6)) if stamp]
    assert Counter(shard_of(stamp.slot) for stamp in taken) == {0: 2, 1: 2, 2: 2}
    for stamp in taken:
        if shard_of(stamp.slot) == 1:
            slots.give(stamp.slot)
    assert [shard_of(stamp.slot) for stamp in (slots.take() for _ in range(2)) if stamp] == [1, 1]
    rest = [shard_of(stamp.slot) for stamp in (slots.take() for _ in range(5)) if stamp]
    assert Counter(rest) == {0: 2, 1: 2}, "the smallest is full"


def test_nobody_is_sent_to_a_draft_side_that_is_not_there() -> None:
    channel = Sharded()
    slots = Slots(channel)
    channel.epochs = [0, 6, 0]
    slots.look()
    assert [shard_of(stamp.slot) for stamp in (slots.take() for _ in range(5)) if stamp] == [1] * 4
    assert not slots.has_room
    assert len(slots.free) == 6
    channel.epochs = [0, 6, 8]
    slots.look()
    assert slots.has_room


def test_a_look_tells_each_change_once() -> None:
    channel = Sharded()
    slots = Slots(channel)
    assert slots.look() == []
    channel.epochs = [0, 6, 9]
    assert slots.look() == [(range(4), 0), (range(8, 10), 9)]
    assert slots.look() == []
    channel.epochs = [10, 6, 9]
    assert slots.look() == [(range(4), 10)]
