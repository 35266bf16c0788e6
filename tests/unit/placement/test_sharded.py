"""Several drafts behind one channel: each is told of its own slots alone, and one may fail without the others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vllm_saguaro.messages import Admit, Outcome, Proposals, Release, Sampling, Stamp, Step, Table, Want
from vllm_saguaro.placement import sharded
from vllm_saguaro.placement.channel import DraftFailed, NoRoom
from vllm_saguaro.placement.sharded import ShardedChannel

SLOTS = 6
LOG = logging.getLogger("saguaro-test-sharded")
FIRST_Q = Proposals(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))


class OneDraft:
    """A draft side that remembers what it was told."""

    def __init__(self, number: int, max_length: int = 40, failure: str = "") -> None:
        self.number, self.max_length, self._failure = number, 0 if failure else max_length, failure
        self.alive, self.taking, self.closed = True, True, False
        self.resident_bytes, self.stalled_seconds = 100 + number, 0.1 * number
        self.sampling_c: float | None = None
        self.shards: Sequence[range] = (range(SLOTS),)
        self.steps: list[Step] = []

    def epoch(self, slot: int) -> int:
        return 10 * self.number + 1 if self.alive else 0

    def post(self, step: Step) -> bool:
        if self.alive and self.taking:
            self.steps.append(step)
        return self.alive and self.taking

    def read(self, slot: int) -> Table | None:
        return Table(Stamp(slot, self.number, 0), [], [], [])

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        return None if self.number else FIRST_Q

    def wait_until_ready(self) -> None:
        if self._failure:
            self.alive = False
            raise DraftFailed(self._failure)

    def close(self) -> None:
        self.closed = True


class Asking(OneDraft):
    """Has to ask for room, and does `then` once it is told how long it may."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        super().__init__(number, max_length=0)
        self._then, self._told, self.seconds = then, threading.Event(), -1.0

    def wait_for_room(self, seconds: float) -> None:
        self.seconds = seconds
        self._told.set()

    def wait_until_ready(self) -> None:
        assert self._told.wait(60), "nobody told it that another one is up"
        self._then()
        self.max_length = 20


def finds_no_room() -> None:
    raise NoRoom("Ray had not placed the draft after 12 s: no node has 1 CPU free", "1 CPU")


def sharing(*drafts: OneDraft, slots: int = SLOTS) -> ShardedChannel:
    return ShardedChannel(drafts, slots, LOG)


def step_of(*slots: int) -> Step:
    """One message of each kind for every slot."""
    stamps = [Stamp(slot, 1, 0) for slot in slots]
    return Step(
        [Admit(stamp, Sampling(), (1, 2)) for stamp in stamps],
        [Want(stamp, 0, 5, 2) for stamp in stamps],
        [Outcome(stamp, 0, 5, 3, (), 0) for stamp in stamps],
        [Release(stamp) for stamp in stamps],
    )


@pytest.mark.parametrize(
    ("drafts", "slots", "expected"),
    [(1, 6, [range(6)]), (2, 6, [range(3), range(3, 6)]), (4, 6, [range(1), range(1, 3), range(3, 4), range(4, 6)])],
)
def test_the_slots_are_shared_out(drafts: int, slots: int, expected: list[range]) -> None:
    assert list(sharing(*map(OneDraft, range(drafts)), slots=slots).shards) == expected


@pytest.mark.parametrize("drafts", [0, 7])
def test_no_draft_goes_without_a_slot(drafts: int) -> None:
    with pytest.raises(ValueError, match=f"{drafts} drafts cannot share 6 slots"):
        sharing(*map(OneDraft, range(drafts)))


def test_each_draft_is_told_of_its_own_slots() -> None:
    first, second = OneDraft(0), OneDraft(1)
    assert sharing(first, second).post(step_of(0, 5, 2))
    assert first.steps == [step_of(0, 2)]
    assert second.steps == [step_of(5)]


def test_a_draft_with_nothing_to_learn_is_told_nothing() -> None:
    first, second = OneDraft(0), OneDraft(1)
    assert sharing(first, second).post(step_of(1))
    assert second.steps == []


def test_a_step_that_one_draft_refuses_is_refused_but_told_to_the_others() -> None:
    """(The speculator, which has to know who refused, posts a step for each draft.)"""
    first, second = OneDraft(0), OneDraft(1)
    first.taking = False
    assert not sharing(first, second).post(step_of(0, 5))
    assert second.steps == [step_of(5)]


def test_a_draft_that_has_ended_has_nothing_to_release() -> None:
    first, second = OneDraft(0), OneDraft(1)
    first.alive = False
    channel = sharing(first, second)
    assert channel.post(Step(releases=[Release(Stamp(0, 1, 0)), Release(Stamp(5, 1, 0))]))
    assert second.steps == [Step(releases=[Release(Stamp(5, 1, 0))])]
    assert not channel.post(Step(outcomes=[Outcome(Stamp(0, 1, 0), 0, 5, 3, (), 0)]))


def test_a_slots_own_draft_answers() -> None:
    first, second = OneDraft(0), OneDraft(1)
    channel = sharing(first, second)
    assert [channel.epoch(slot) for slot in range(SLOTS)] == [1, 1, 1, 11, 11, 11]
    tables = [channel.read(slot) for slot in (2, 3)]
    assert [table.stamp.generation for table in tables if table is not None] == [0, 1]
    assert channel.proposals(Stamp(0, 1, 0), 1, 0, 1) is FIRST_Q
    assert channel.proposals(Stamp(5, 1, 0), 1, 0, 1) is None
    assert channel.resident_bytes == 201
    assert channel.stalled_seconds == pytest.approx(0.1)


def test_c_is_the_mean_of_the_drafts_that_have_one() -> None:
    first, second, third = drafts = OneDraft(0), OneDraft(1), OneDraft(2)
    channel = sharing(*drafts)
    assert channel.sampling_c is None
    second.sampling_c = 0.0
    assert channel.sampling_c == 0.0
    first.sampling_c = 0.5
    assert channel.sampling_c == 0.25
    third.sampling_c = 1.0
    assert channel.sampling_c == 0.5


def test_it_lives_as_long_as_any_draft_does() -> None:
    first, second = OneDraft(0), OneDraft(1)
    channel = sharing(first, second)
    first.alive = False
    assert channel.alive
    assert channel.epoch(0) == 0
    assert channel.epoch(5) == 11
    second.alive = False
    assert not channel.alive


def test_it_goes_on_with_the_drafts_that_came_up(caplog: pytest.LogCaptureFixture) -> None:
    channel = sharing(OneDraft(0, 40), OneDraft(1, failure="no room"), OneDraft(2, 30))
    channel.wait_until_ready()
    assert channel.max_length == 30
    assert caplog.messages == ["Draft 2 of 3 did not come up: no room.", "Going on with 2 of 3 drafts."]


def test_a_draft_that_failed_is_ended() -> None:
    drafts = OneDraft(0), OneDraft(1, failure="it has no memory")
    sharing(*drafts).wait_until_ready()
    assert [draft.closed for draft in drafts] == [False, True]


def test_drafts_without_room_are_waited_for_at_once_and_left_asking(caplog: pytest.LogCaptureFixture) -> None:
    """Each of them waits until another one is up: one after the other they would wait for ever."""
    waiting = Asking(0, finds_no_room), Asking(2, finds_no_room)
    channel = sharing(waiting[0], OneDraft(1), waiting[1])
    channel.wait_until_ready()
    assert channel.max_length == 40
    assert [draft.seconds for draft in waiting] == [sharded._ROOM_SECONDS] * 2
    assert not any(draft.closed for draft in waiting), "they come when there is room"
    assert caplog.messages == [
        "Going on with 1 of 3 drafts: no node of the Ray cluster has 1 CPU free. More come as soon as there is room."
    ]


def test_a_draft_that_loads_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    slow = Asking(1, lambda: None)
    channel = sharing(OneDraft(0), slow)
    channel.wait_until_ready()
    assert channel.max_length == 20, "it is up"
    assert caplog.messages == []


def test_without_room_for_any_it_does_not_start() -> None:
    drafts = [Asking(number, finds_no_room) for number in range(2)]
    for draft in drafts:
        draft.wait_for_room(1.0)
    with pytest.raises(NoRoom, match="no node has 1 CPU free"):
        sharing(*drafts).wait_until_ready()


def test_any_other_error_of_one_is_that_of_all() -> None:
    def breaks() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sharing(OneDraft(0), Asking(1, breaks)).wait_until_ready()


def test_without_any_draft_it_does_not_start() -> None:
    with pytest.raises(DraftFailed, match="no room"):
        sharing(OneDraft(0, failure="no room"), OneDraft(1, failure="no luck")).wait_until_ready()


def test_closing_ends_every_draft_at_once() -> None:
    """Each waits for the other in its `close`: one after the other they would wait for ever."""
    both = threading.Barrier(2, timeout=60)

    class Slow(OneDraft):
        def close(self) -> None:
            both.wait()
            super().close()

    drafts = Slow(0), Slow(1)
    sharing(*drafts).close()
    assert all(draft.closed for draft in drafts)


@pytest.mark.parametrize("stuck", [0, 1])
def test_one_that_cannot_be_closed_does_not_keep_the_others(stuck: int) -> None:
    class Stuck(OneDraft):
        def close(self) -> None:
            raise OSError("it will not")

    drafts = [OneDraft(number) for number in range(3)]
    drafts[stuck] = Stuck(stuck)
    with pytest.raises(OSError, match="it will not"):
        sharing(*drafts).close()
    assert [draft.closed for draft in drafts] == [number != stuck for number in range(3)]


def test_drafts_are_closed_where_no_thread_starts_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    drafts = OneDraft(0), OneDraft(1)
    shared = sharing(*drafts)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    shared.close()
    assert all(draft.closed for draft in drafts)
