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

    def look() -> list[tuple[range, int]]:
        return [(shard.slots, shard.epoch) for shard in slots.look()]

    assert look() == []
    channel.epochs = [0, 6, 9]
    assert look() == [(range(4), 0), (range(8, 10), 9)]
    assert look() == []
    channel.epochs = [10, 6, 9]
    assert look() == [(range(4), 10)]


def test_one_that_has_refused_comes_after_all_others() -> None:
    slots = Slots(Sharded())
    slots.shards[0].did_not_take()
    taken = [shard_of(stamp.slot) for stamp in (slots.take() for _ in range(8)) if stamp]
    assert Counter(taken[:6]) == {1: 4, 2: 2}
    assert taken[6:] == [0, 0], "better than none"
    slots.shards[0].took(anything=False)
    slots.give(1)
    slots.give(4)
    assert [shard_of(stamp.slot) for stamp in (slots.take() for _ in range(1)) if stamp] == [0]


def test_one_that_rests_has_no_room_for_requests_that_are_told_anew() -> None:
    slots = Slots(FakeChannel(slots=1))
    (shard,) = slots.shards
    for rest in (0, 1, 3, 7, 15, 31, 63, 63):
        shard.did_not_take()
        assert shard.rest == rest
    assert slots.has_room
    assert not slots.has_room_anew
    assert not slots.learns
    assert slots.take(anew=True) is None
    for _ in range(63):
        assert not slots.learns
        shard.took(anything=True)
    assert slots.learns
    assert slots.has_room_anew
    assert slots.take(anew=True) is not None
    assert not slots.has_room_anew
    assert slots.learns, "it would, if somebody left"


def test_refusals_are_forgotten_once_something_is_taken_after_the_rest_or_with_the_life() -> None:
    slots = Slots(FakeChannel(slots=1))
    (shard,) = slots.shards
    for _ in range(2):
        shard.did_not_take()
    shard.took(anything=True)  # the rest
    shard.took(anything=False)
    shard.did_not_take()
    assert shard.rest == 3
    for _ in range(4):
        shard.took(anything=True)
    shard.did_not_take()
    assert shard.rest == 0
    shard.did_not_take()
    shard.begin_anew(2)
    assert (shard.epoch, shard.rest, shard.refused, shard.refusals) == (2, 0, False, 0)
