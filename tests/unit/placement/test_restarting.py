"""One life after the other: what ends them, how long it takes until the next one, and what the engine's thread sees."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.unit.placement.watching import until
from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Outcome, Proposals, Release, Round, Stamp, Step, Table, Work
from vllm_saguaro.placement import restarting
from vllm_saguaro.placement.channel import Channel, DraftFailed, NoRoom, NotAdmitted
from vllm_saguaro.placement.restarting import Care, RestartingChannel

STEP = Step(releases=[Release(Stamp(0, 1, 0))])
CARE = Care(look_every=1e6, first_back_off=1, longest_back_off=6, good_life=300, hang=10, longest_hang=40)
"""Only the tests look."""
ROUND = Round(Work.ROUND, 1, 2, 3, 4, 1, 5)


class Life:
    """One life of a draft side: as sound as it is told to be."""

    resident_bytes = 77
    sampling_c: float | None = 0.5

    def __init__(self, max_length: int = 40, error: str = "") -> None:
        self.max_length, self.error = max_length, error
        self.shards: Sequence[range] = (range(4),)
        self.alive, self.closed = True, 0
        self.stalled_seconds = 0.0
        self.taken: list[Step] = []
        self.table: Table | None = None
        self.while_waiting: Callable[[], None] = lambda: None

    def epoch(self, slot: int) -> int:
        return int(self.alive)

    def post(self, step: Step) -> bool:
        assert not self.closed, "told something after its memory was given back"
        self.taken.append(step)
        return self.alive

    def read(self, slot: int) -> Table | None:
        assert not self.closed, "read after its memory was given back"
        return self.table or Table(Stamp(slot, 1, 0), [], [], [])

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        assert not self.closed
        return None

    def wait_until_ready(self) -> None:
        self.while_waiting()
        if self.error:
            raise DraftFailed(self.error)
        if self.closed:
            raise DraftFailed("closed while it started")

    def close(self) -> None:
        self.alive, self.closed = False, self.closed + 1


class Ward:
    """A restarting channel over lives that the test hands out, and a clock that it winds."""

    def __init__(
        self, *lives: Life | Exception, restarts: int = 5, care: Care = CARE, device_counts: bool = False
    ) -> None:
        self.now = 1000.0
        self.lives = list(lives) or [Life() for _ in range(20)]
        self.started: list[tuple[float, Life]] = []
        self.page = CounterPage()
        log = logging.getLogger("saguaro-test")
        log.setLevel(logging.INFO)
        hits = (lambda: self.page.value(counters.HITS)) if device_counts else None
        self.channel = RestartingChannel(self._start, restarts, self.page, log, care, lambda: self.now, hits=hits)

    def _start(self) -> Life:
        life = self.lives.pop(0)
        if isinstance(life, Exception):
            raise life
        self.started.append((self.now, life))
        return life

    @property
    def newest(self) -> Life:
        return self.started[-1][1]

    def run(self, seconds: float, stalls: float = 0.0) -> None:
        """Look every tenth of a second; with `stalls`, the newest life leaves its oldest step unread meanwhile."""
        for _ in range(round(10 * seconds)):
            self.now += 0.1
            if stalls:
                self.newest.stalled_seconds += 0.1
            self.channel.look()

    def up(self) -> tuple[float, float, float]:
        return (
            self.page.value(counters.DRAFT_UP),
            self.page.value(counters.DRAFT_RESTARTS),
            self.page.value(counters.DRAFT_LEFT_OFF),
        )


Watched = Callable[..., Ward]


@pytest.fixture
def watched() -> Iterator[Watched]:
    """Makes wards whose first life has come up, and ends them."""
    made: list[Ward] = []

    def make(*lives: Life | Exception, **options: Any) -> Ward:
        made.append(Ward(*lives, **options))
        made[-1].channel.wait_until_ready()
        return made[-1]

    yield make
    for ward in made:
        ward.channel.close()


@pytest.fixture
def ward(watched: Watched) -> Ward:
    return watched()


def test_whether_it_answers_is_told_as_it_changes() -> None:
    told: list[bool] = []
    lives = [Life(), Life()]
    channel = RestartingChannel(
        lambda: lives.pop(0), 5, CounterPage(), logging.getLogger("saguaro-test"), QUICK, told=told.append
    )
    first = channel._present
    assert isinstance(first, Life)
    assert told == []
    channel.wait_until_ready()
    assert told == [True]
    first.alive = False
    assert until(lambda: told == [True, False, True])
    channel.close()
    assert told == [True, False, True, False]


def test_the_rounds_are_those_of_the_present_life() -> None:
    class Telling(Life):
        def rounds(self) -> list[Round]:
            return [ROUND]

    for life, expected in ((Telling(), [ROUND]), (Life(), [])):
        ward = Ward(life)
        ward.channel.wait_until_ready()
        assert list(ward.channel.rounds()) == expected
        ward.channel.close()
        assert list(ward.channel.rounds()) == []


def test_a_sound_draft_side_is_passed_through(ward: Ward) -> None:
    channel: Channel = ward.channel
    ward.run(1000)
    assert (channel.alive, channel.max_length, channel.resident_bytes, channel.sampling_c) == (True, 40, 77, 0.5)
    assert list(channel.shards) == [range(4)]
    assert channel.post(STEP)
    assert ward.newest.taken == [STEP]
    assert channel.read(3) == Table(Stamp(3, 1, 0), [], [], [])
    assert channel.epoch(3) == channel.epoch(0) > 0
    assert ward.up() == (1, 0, 0)
    assert len(ward.started) == 1


def test_without_a_life_nothing_is_taken_and_nothing_is_there(ward: Ward) -> None:
    ward.newest.alive = False
    ward.run(0.1)
    channel = ward.channel
    assert not channel.alive
    assert not channel.post(STEP)
    assert channel.read(0) is None
    assert channel.proposals(Stamp(0, 1, 0), 1, 0, 1) is None
    assert (channel.epoch(0), channel.stalled_seconds, channel.resident_bytes) == (0, 0.0, 0)
    assert channel.sampling_c is None
    assert ward.newest.closed == 1
    assert ward.up() == (0, 0, 0)


def test_the_end_is_seen_by_the_engine_before_anybody_looked(ward: Ward) -> None:
    ward.newest.alive = False
    assert not ward.channel.alive
    assert ward.channel.epoch(0) == 0
    assert not ward.channel.post(STEP)


def test_the_next_life_has_another_epoch_and_its_own_length(watched: Watched) -> None:
    ward = watched(Life(), Life(max_length=30), Life())
    epochs = [ward.channel.epoch(0)]
    for length in (30, 40):
        ward.newest.alive = False
        ward.run(10)
        assert (ward.channel.alive, ward.channel.max_length) == (True, length)
        epochs.append(ward.channel.epoch(0))
    assert len(set(epochs)) == 3
    assert min(epochs) > 0
    assert ward.up() == (1, 2, 0)


def test_the_own_lives_of_what_is_wrapped_are_told_apart_as_well(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ward.newest, "epoch", lambda slot: slot)
    assert ward.channel.epoch(0) == 0
    assert 0 < ward.channel.epoch(1) < ward.channel.epoch(2)


def test_a_life_that_ends_at_once_is_followed_after_twice_the_time(ward: Ward) -> None:
    for _ in range(5):
        ward.newest.alive = False
        ward.run(8)
    gaps = [round(after - before, 1) for (before, _), (after, _) in zip(ward.started, ward.started[1:], strict=False)]
    waited = [1, 2, 4, 6, 6]  # 6 at most
    ends = [0.1] + [8.1 - before for before in waited[:-1]]
    assert gaps == pytest.approx([end + wait for end, wait in zip(ends, waited, strict=True)], abs=0.25)


@pytest.mark.parametrize("restarts", [0, 1, 5])
def test_after_so_many_restarts_in_a_row_it_is_left_off(
    restarts: int, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    ward = watched(restarts=restarts)
    for _ in range(9):
        ward.newest.alive = False
        ward.run(10)
    assert len(ward.started) == 1 + restarts
    assert ward.up() == (0, restarts, 1)
    assert not ward.channel.look(), "there is nothing to look after any more"
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"After {restarts} restarts in a row it is left off" in line
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == restarts
    assert all(life.closed == 1 for _, life in ward.started)


def serve(ward: Ward, hit: bool) -> None:
    """A round whose outcome the newest life's table has, or has not."""
    stamp = Stamp(0, 1, 0)
    ward.newest.table = Table(stamp, [2], [7], [[5], [6]])
    ward.channel.read(0)
    ward.channel.post(Step(outcomes=[Outcome(stamp, 2 if hit else 1, 7, 9, (), 2)]))


def test_a_life_that_was_of_use_has_not_failed_and_is_still_not_started_again_and_again_at_once(ward: Ward) -> None:
    """As where an operator, or the machine, ends it from outside: useful in between, it must not be left off."""
    for _ in range(12):
        serve(ward, hit=True)
        ward.newest.alive = False
        ward.run(10)
    assert ward.up() == (1, 12, 0)
    gaps = [after - before for (before, _), (after, _) in zip(ward.started[-4:], ward.started[-3:], strict=False)]
    assert min(gaps) > 5.9, "the back-off goes on: only a long life makes up for that"


def test_hits_that_a_device_counts_are_as_good_as_those_that_are_posted(watched: Watched) -> None:
    ward = watched(device_counts=True)
    ward.page.add(counters.HITS, 3)
    for _ in range(12):
        ward.page.add(counters.HITS)
        ward.newest.alive = False
        ward.run(10)
    assert ward.up() == (1, 12, 0)


def test_hits_that_a_device_counted_before_a_life_do_not_make_up_for_its_end(watched: Watched) -> None:
    ward = watched(device_counts=True)
    for _ in range(6):
        ward.newest.alive = False
        ward.run(0.3)
        ward.page.add(counters.HITS, 5)  # the last ones of that life arrive
        ward.run(10)
    assert ward.up() == (0, 5, 1)


@pytest.mark.parametrize("how", ["no hit", "of another round", "of another life", "without drafts"])
def test_what_was_no_hit_of_this_life_does_not_make_up_for_its_end(ward: Ward, how: str) -> None:
    for _ in range(6):
        serve(ward, hit=False)
        if how == "of another round":
            ward.channel.post(Step(outcomes=[Outcome(Stamp(0, 1, 1), 2, 7, 9, (), 2)]))
        elif how == "without drafts":
            ward.newest.table = Table(Stamp(0, 1, 0), [2], [7], [])
            ward.channel.read(0)
            ward.channel.post(Step(outcomes=[Outcome(Stamp(0, 1, 0), 2, 7, 9, (), 2)]))
        ward.newest.alive = False
        ward.run(10)
        if how == "of another life":  # its table was read, and it has ended before the outcome was told
            ward.channel.post(Step(outcomes=[Outcome(Stamp(0, 1, 0), 2, 7, 9, (), 2)]))
    assert ward.up() == (0, 5, 1)


def test_a_good_life_makes_up_for_the_failures_before_it(ward: Ward) -> None:
    for _ in range(4):
        ward.newest.alive = False
        ward.run(10)
    ward.run(301)
    for _ in range(5):
        assert ward.channel.alive
        ward.newest.alive = False
        ward.run(10)
    assert ward.channel.alive
    assert ward.up() == (1, 9, 0)
    ward.newest.alive = False
    ward.run(10)
    assert ward.up() == (0, 9, 1)


@pytest.mark.parametrize("how", ["cannot be started", "does not come up"])
def test_a_start_that_fails_counts_as_a_life(how: str, watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    bad = [OSError("no memory") if how == "cannot be started" else Life(error="no memory") for _ in range(2)]
    ward = watched(Life(), *bad, Life())
    ward.newest.alive = False
    ward.run(30)
    assert ward.channel.alive
    assert ward.up() == (1, 3, 0)
    assert [life.closed for life in bad if isinstance(life, Life)] in ([], [1, 1])
    assert caplog.text.count("did not come up (no memory)") == 2


def test_the_first_life_that_does_not_come_up_is_an_error_and_not_tried_again() -> None:
    ward = Ward(Life(error="no such model"), Life())
    with pytest.raises(DraftFailed, match="no such model"):
        ward.channel.wait_until_ready()
    ward.channel.close()
    assert len(ward.started) == 1
    assert ward.newest.closed == 1


# ---- a pool that does not take us ---------------------------------------------------------------------------------


def refused(why: str = "it is full", disagrees: bool = False) -> Life:
    """The start of a life for which there is no place in a draft pool."""
    life = Life()

    def refuse() -> None:
        raise NotAdmitted(why, disagrees)

    life.while_waiting = refuse
    return life


def test_an_engine_without_a_place_in_the_pool_starts_and_asks_again(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    ward = watched(*[refused() for _ in range(9)], Life())
    assert not ward.channel.alive
    assert ward.channel.epoch(0) == 0
    assert not ward.channel.post(STEP)
    ward.run(8 * 6 + 4)
    assert len(ward.started) == 9, "every six seconds"
    assert not ward.channel.alive
    ward.run(6)
    assert ward.channel.alive
    assert ward.channel.max_length == 40
    assert ward.up() == (1, 0, 0), "it is the first life"
    assert all(life.closed == 1 for _, life in ward.started[:9])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "does not take this engine: it is full. Decoding goes on without drafts, and it is asked again" in line


def test_after_a_place_was_had_a_start_is_a_restart(watched: Watched) -> None:
    ward = watched(refused(), Life(), Life())
    ward.run(7)
    ward.newest.alive = False
    ward.run(5)
    assert ward.up() == (1, 1, 0)


def test_a_place_that_is_not_had_again_is_asked_for_as_long_as_it_takes(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where those who came first have other settings: they may leave."""
    ward = watched(Life(), *[refused() for _ in range(7)], *[refused("K differs", True) for _ in range(7)], Life())
    ward.newest.alive = False
    ward.run(6 * 15 + 5)
    assert ward.channel.alive
    assert ward.up() == (1, 1, 0), "no refusal is a restart, nor a failure"
    said = [record.getMessage() for record in caplog.records if "does not take" in record.getMessage()]
    assert ["it is full" in line for line in said] == [True, False], "each reason once"


def test_an_engine_whose_settings_are_not_the_pools_does_not_start() -> None:
    ward = Ward(refused("K differs", disagrees=True))
    with pytest.raises(DraftFailed, match="K differs"):
        ward.channel.wait_until_ready()
    ward.channel.close()


def test_one_that_waits_for_a_place_can_be_closed(watched: Watched) -> None:
    ward = watched(refused())
    ward.channel.close()
    assert ward.newest.closed == 1
    assert ward.up() == (0, 0, 0)


# ---- a cluster without room ----------------------------------------------------------------------------------------


class Asking(Life):
    """The start of a life that has to find room first."""

    def __init__(self, error: str = "") -> None:
        super().__init__(error=error)
        self.room, self.seconds = False, -1.0

    def wait_for_room(self, seconds: float) -> None:
        self.seconds = seconds

    def wait_until_ready(self) -> None:
        if not self.room and not self.closed:
            raise NoRoom("no node has 1 CPU free", "1 CPU")
        super().wait_until_ready()


def asking(*lives: Life) -> Ward:
    """Whose first life finds no room."""
    ward = Ward(*lives)
    ward.channel.wait_for_room(3.0)
    first = lives[0]
    assert isinstance(first, Asking)
    assert first.seconds == 3.0
    with pytest.raises(NoRoom):
        ward.channel.wait_until_ready()
    assert first.seconds == 0.0, "the thread that looks after it does not stand and wait"
    return ward


def test_a_first_life_without_room_begins_when_there_is_some(caplog: pytest.LogCaptureFixture) -> None:
    first = Asking()
    ward = asking(first, Life())
    ward.run(1000)
    assert (ward.channel.alive, ward.channel.epoch(0), ward.channel.post(STEP)) == (False, 0, False)
    assert (len(ward.started), first.closed) == (1, 0), "it is the same one that asks all the time"
    first.room = True
    ward.run(0.1)
    assert ward.channel.alive
    assert ward.channel.max_length == 40
    assert ward.up() == (1, 0, 0), "it is the first life"
    assert caplog.messages == []
    first.alive = False
    ward.run(5)
    assert ward.up() == (1, 1, 0)
    ward.channel.close()


def test_a_next_life_without_room_is_no_failure(watched: Watched) -> None:
    lives = [Asking() for _ in range(7)]
    ward = watched(Life(), *lives)
    for number, life in enumerate(lives, start=1):
        ward.newest.alive = False
        ward.run(20)
        assert len(ward.started) == 1 + number
        assert not ward.channel.alive
        life.room = True
        ward.run(0.1)
        assert ward.up() == (1, number, 0)
        serve(ward, hit=True)


def test_a_first_life_that_finds_room_and_does_not_load_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    first = Asking(error="no such model")
    ward = asking(first, Life())
    first.room = True
    ward.run(0.1)
    assert "The draft side did not come up (no such model)" in caplog.text
    ward.run(2)
    assert ward.up() == (1, 1, 0)
    assert first.closed == 1
    ward.channel.close()


def test_one_that_waits_for_room_can_be_closed() -> None:
    first = Asking()
    ward = asking(first)
    ward.run(1)
    ward.channel.close()
    assert first.closed == 1
    assert ward.up() == (0, 0, 0)
    assert not threads()


# ---- hangs ----------------------------------------------------------------------------------------------------------


def test_a_life_that_reads_nothing_for_long_is_ended_and_followed(ward: Ward, caplog: pytest.LogCaptureFixture) -> None:
    first = ward.newest
    ward.run(9.8, stalls=True)
    assert ward.channel.alive
    ward.run(0.4, stalls=True)
    assert not ward.channel.alive
    assert first.closed == 1
    ward.run(2)
    assert ward.channel.alive
    assert "has not read a step for 10.0 s" in caplog.text


def test_a_life_that_reads_now_and_then_is_left_alone(ward: Ward) -> None:
    for _ in range(20):
        ward.run(9, stalls=True)
        ward.newest.stalled_seconds = 0.05  # another step is the oldest
        ward.run(0.1)
    assert len(ward.started) == 1


@pytest.mark.parametrize("stalled_before", [0.0, 3.0])
def test_a_time_in_which_this_process_stood_still_is_not_held_against_the_draft(
    ward: Ward, stalled_before: float
) -> None:
    """Stopped and continued together, as by a freezer or in a suspended machine: both clocks have jumped."""
    ward.run(stalled_before, stalls=True)
    ward.now += 3600
    ward.newest.stalled_seconds += 3600
    assert ward.channel.look()
    assert ward.channel.alive
    ward.newest.stalled_seconds = 0.0
    ward.run(5)
    assert len(ward.started) == 1


def test_a_draft_that_is_merely_slow_finds_a_bound_that_it_can_keep(ward: Ward) -> None:
    """Steps wait for 25 s here: too long for the first bound, and for the second."""
    for _ in range(8):
        for _ in range(3):
            ward.run(25, stalls=True)
            ward.newest.stalled_seconds = 0.0
            ward.run(3)
    assert len(ward.started) == 3
    assert ward.channel.alive


@pytest.mark.parametrize(("seconds", "how", "bound"), [(301, "ends", 10), (299, "ends", 20), (301, "hangs", 40)])
def test_a_good_life_that_did_not_hang_makes_up_for_the_hangs_before_it(
    ward: Ward, seconds: float, how: str, bound: float
) -> None:
    def hang(bound: float) -> None:
        ward.run(bound - 0.2, stalls=True)
        assert ward.channel.alive
        ward.run(0.4, stalls=True)
        assert not ward.channel.alive
        ward.run(6)
        assert ward.channel.alive

    hang(10)
    ward.run(seconds - 6)
    if how == "hangs":
        hang(20)
    else:
        ward.newest.alive = False
        ward.run(6)
    hang(bound)


def test_the_bound_of_a_hang_has_its_own_bound(ward: Ward) -> None:
    ward.channel._restarts = 100
    for _ in range(6):
        ward.run(60, stalls=True)
    assert len(ward.started) > 5


# ---- the end --------------------------------------------------------------------------------------------------------


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "saguaro-draft-restarts"}


QUICK = Care(look_every=0.001, first_back_off=0.0, hang=0.02, longest_hang=0.02)


def quick(*lives: Life) -> RestartingChannel:
    """With the real clock, its thread, and hardly any patience."""
    left: list[Any] = list(lives)
    log = logging.getLogger("saguaro-test")
    return RestartingChannel(lambda: left.pop(0), 5, CounterPage(), log, QUICK)


def test_the_thread_looks_by_itself() -> None:
    first, second = Life(), Life()
    channel = quick(first, second)
    channel.wait_until_ready()
    first.alive = False
    assert until(lambda: channel.alive)
    channel.close()
    assert (first.closed, second.closed) == (1, 1)
    assert not threads()


def test_close_ends_the_present_life_and_the_thread(ward: Ward) -> None:
    ward.channel.close()
    ward.channel.close()
    assert ward.newest.closed == 1
    assert not threads()
    assert not ward.channel.post(STEP)
    assert ward.up() == (0, 0, 0)


def test_close_in_the_middle_of_a_start_ends_the_life_that_starts() -> None:
    first, second = Life(), Life()
    waits, closed = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        assert until(lambda: second.closed > 0)
        closed.set()

    second.while_waiting = wait
    channel = quick(first, second)
    channel.wait_until_ready()
    first.alive = False
    assert waits.wait(60)
    channel.close()
    assert closed.is_set(), "it went on before the thread had ended"
    assert (first.closed, second.closed) == (1, 1)
    assert not threads()


def test_a_life_that_starts_as_all_is_closed_is_closed_as_well() -> None:
    """`close` comes before there is anything to close, and ends before it comes up."""
    first, second = Life(), Life()
    starts, goes_on = threading.Event(), threading.Event()

    def start() -> Life:
        if lives:
            return lives.pop()
        starts.set()
        assert goes_on.wait(60)
        return second

    lives = [first]
    channel = RestartingChannel(start, 5, CounterPage(), logging.getLogger("saguaro-test"), QUICK)
    channel.wait_until_ready()
    first.alive = False
    assert starts.wait(60)
    closing = threading.Thread(target=channel.close)
    closing.start()
    assert until(channel._closing.is_set)
    goes_on.set()
    closing.join(60)
    assert (first.closed, second.closed) == (1, 1)
    assert not threads()


def test_a_life_that_cannot_be_closed_does_not_stop_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(Life):
        def close(self) -> None:
            raise OSError("it will not go")

    first, second = Stubborn(), Life()
    channel = quick(first, second)
    channel.wait_until_ready()
    first.alive = False
    assert until(lambda: channel.alive)
    channel.close()
    assert "it will not go" in caplog.text


def test_one_that_is_dropped_unclosed_takes_its_thread_and_its_life_with_it() -> None:
    life = Life()
    gone = weakref.ref(life)
    channel: RestartingChannel | None = quick(life)
    assert channel is not None
    channel.wait_until_ready()
    del channel, life
    gc.collect()
    assert until(lambda: gone() is None)
    assert until(lambda: not threads())


CALLS: dict[str, Callable[[RestartingChannel], object]] = {
    "post": lambda channel: channel.post(STEP),
    "read": lambda channel: channel.read(0),
    "proposals": lambda channel: channel.proposals(Stamp(0, 1, 0), 1, 0, 1),
    "epoch": lambda channel: channel.epoch(0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ended_by", ["look", "close"])
def test_no_life_is_closed_under_a_call_in_progress(watched: Watched, name: str, ended_by: str) -> None:
    """It would have given back the memory that the call is about to touch."""
    ward = watched()
    life = ward.newest
    call = getattr(life, name)
    ending = threading.Thread(target=getattr(ward.channel, ended_by))

    def call_while_it_ends(*given: Any) -> object:
        life.alive = False
        ending.start()
        ending.join(0.1)
        assert not life.closed
        return call(*given)

    setattr(life, name, call_while_it_ends)
    CALLS[name](ward.channel)
    ending.join(60)
    assert life.closed == 1


def test_the_thread_outlives_a_restart_that_raises_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = Life(), Life()
    lives: list[Life | Exception] = [first, ValueError("a bug"), last]

    def start() -> Life:
        life = lives.pop(0)
        if isinstance(life, Exception):
            raise life
        return life

    channel = RestartingChannel(start, 5, CounterPage(), logging.getLogger("saguaro-test"), QUICK)
    channel.wait_until_ready()
    first.alive = False
    assert until(lambda: channel.alive)
    channel.close()
    assert last.closed == 1


def test_defaults_are_those_that_the_documentation_names() -> None:
    assert Care() == Care(0.15, 1.0, 60.0, 300.0, 10.0, 160.0)
    assert restarting._LONGEST_GAP == 1.0
