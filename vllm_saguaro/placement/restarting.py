"""A draft side that is started again when it ends or hangs: itself a channel, around one life after the other.

A thread looks at the present life several times a second. All that takes time (to end a life, to start the next one, to
wait until it has loaded) is done by that thread; the engine's thread never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Proposals, Round, Stamp, Step, Table
from vllm_saguaro.placement.channel import Channel, Lender, NoRoom, NotAdmitted, Placed, Traced

_LONGEST_GAP = 1.0
"""Seconds between two looks that count as watched. A longer gap means that this process itself stood still, or the
whole machine: the draft side may have stood still with it, and gets as long as ever."""


@dataclass(frozen=True, slots=True)
class Care:
    """How a draft side is looked after; all times in seconds."""

    look_every: float = 0.15
    first_back_off: float = 1.0
    """From the end of a life to the start of the next one; twice as long each time, up to `longest_back_off`."""
    longest_back_off: float = 60.0
    good_life: float = 300.0
    """A life that lasted so long makes up for the back-off, too: the next one is started after the shortest."""
    hang: float = 10.0
    """A step that waits unread for so long means a hang. Compiling is done before a life counts as begun; but one
    forward over a piece of a prompt may take a large draft on a slow core longer than this. So each hang doubles it, up
    to `longest_hang`: a draft that is merely slow finds a bound that it can keep. A good life that ends otherwise makes
    up for the hangs before it."""
    longest_hang: float = 160.0


class RestartingChannel:
    """The present life of a draft side, or none: then nothing is taken and nothing is there to read.

    The lock keeps each call of the engine's thread and the end of a life apart: a life is taken out under the lock and
    closed after that, when no call can be in it any more. (To drop it unclosed, and let the last reference give back
    its memory, would leave it to chance when that is.) The looking-after thread holds the lock for an assignment.
    """

    def __init__(
        self,
        start: Callable[[], Channel],
        restarts: int,
        page: CounterPage,
        log: logging.Logger,
        care: Care | None = None,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[bool], None] = lambda up: None,
        hits: Callable[[], float] | None = None,
    ) -> None:
        """`start` begins a life; it is called here for the first one. `restarts`: how many in a row, at most.

        `clock`: seconds, for all times of `care`. `told`, from any thread: whether the draft side answers from now on.
        `hits`: how many outcomes have had drafts so far, where that is counted elsewhere (by a device, which tells its
        outcomes past `post`); any thread may ask.
        """
        self._start, self._restarts, self._page, self._log = start, restarts, page, log
        self._care, self._clock, self._told = care or Care(), clock, told
        self._hits = hits or (lambda: 0.0)
        self._hits_before = self._hits()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._present: Channel | None = start()
        self._starting: Channel | None = None
        self._life = 1
        self.shards: Sequence[range] = self._present.shards
        self.max_length = self._present.max_length
        """Longest text, in tokens, that the newest life can hold."""
        self._began_at = self._looked_at = clock()
        self._again_at = 0.0
        self._failures = 0
        """Lives in a row that were of no use."""
        self._ends = 0
        """Lives in a row that were not long."""
        self._useful = False
        self._last_read: dict[int, Table] = {}
        """By slot, until the present life has been of use."""
        self._left_off = False
        self._first_waits = False
        """Whether there is no room yet for the first life, or no place in a pool: its start is no restart."""
        self._refused_for = ""
        self._said_up = False
        self._hung_for = 0.0
        self._hang = self._care.hang

    # ---- the engine's thread -----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there is a life that answers."""
        with self._lock:
            return self._present is not None and self._present.alive

    @property
    def resident_bytes(self) -> int:
        """Memory of the present life."""
        with self._lock:
            return 0 if self._present is None else self._present.resident_bytes

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step has waited in the present life; 0.0 without one."""
        with self._lock:
            return 0.0 if self._present is None else self._present.stalled_seconds

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling that the present life told last."""
        with self._lock:
            return None if self._present is None else self._present.sampling_c

    def epoch(self, slot: int) -> int:
        """The number of the life, with its own epoch in the low bits."""
        with self._lock:
            within = 0 if self._present is None else self._present.epoch(slot)
            return (self._life << 32) + within if within else 0

    def post(self, step: Step) -> bool:
        """Tell the present life."""
        with self._lock:
            if not self._useful and step.outcomes:
                self._note_hits(step)
            return self._present is not None and self._present.post(step)

    def read(self, slot: int) -> Table | None:
        """The present life's table."""
        with self._lock:
            table = None if self._present is None else self._present.read(slot)
            if not self._useful and table is not None:
                self._last_read[slot] = table
            return table

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q that the present life told. Of a life before it there is none: those drafts count as certain."""
        with self._lock:
            return None if self._present is None else self._present.proposals(stamp, version, branch, depth)

    def rounds(self) -> Sequence[Round]:
        """What the present life was busy with since the last call."""
        with self._lock:
            present = self._present
        return present.rounds() if isinstance(present, Traced) else []

    def lend(self) -> memoryview | None:
        """The present life's mailbox, for a device, where it lies in memory of this machine."""
        with self._lock:
            return self._present.lend() if isinstance(self._present, Lender) else None

    def wait_until_ready(self) -> None:
        """Wait for the first life, and look after it from then on.

        Raises `DraftFailed` when it does not come up: what never worked is not tried again, it is a wrong setting.
        Where a pool has no room that is none: it is asked again. `NoRoom` is raised, too, but that life is looked
        after: it begins when there is room, unless this channel is closed.
        """
        present, no_room = self._present, None
        assert present is not None
        try:
            present.wait_until_ready()
            self.max_length = present.max_length
            self._began_at = self._looked_at = self._clock()
            self._hits_before = self._hits()
            self._say(up=True)
        except NotAdmitted as refusal:
            if refusal.disagrees:
                raise
            with self._lock:
                self._present, self._first_waits = None, True
            self._close(present)
            self._ask_again(refusal)
        except NoRoom as lack:
            no_room = lack
            self._look_for_room(present)
            with self._lock:
                if self._present is present:  # else `close` has it
                    self._starting, self._present, self._first_waits = present, None, True
        # It knows this object weakly: one that is dropped without `close` goes, and its draft side with it.
        self._thread = threading.Thread(
            target=_look_after,
            args=(weakref.ref(self), self._closing, self._care.look_every),
            name="saguaro-draft-restarts",
            daemon=True,
        )
        self._thread.start()
        if no_room is not None:
            raise no_room

    def wait_for_room(self, seconds: float) -> None:
        """How long `wait_until_ready` waits for room."""
        with self._lock:
            if isinstance(self._present, Placed):
                self._present.wait_for_room(seconds)

    def close(self) -> None:
        """End everything, also in the middle of a restart."""
        self._closing.set()
        with self._lock:
            present, self._present = self._present, None
            starting, self._starting = self._starting, None
        if starting is not None:
            starting.close()  # the thread that waits for it is told so
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if present is not None:
            present.close()
        self._say(up=False)

    def _note_hits(self, step: Step) -> None:
        """A life is of use from the first outcome on that its tables had drafts for; then no more is noted."""
        for outcome in step.outcomes:
            table = self._last_read.get(outcome.stamp.slot)
            if table is not None and table.stamp == outcome.stamp and table.drafts:
                self._useful = self._useful or table.find(outcome.accepted, outcome.bonus) is not None
        if self._useful:
            self._last_read.clear()

    def _say(self, up: bool) -> None:
        if up != self._said_up:
            self._said_up = up
            self._page.count_in(counters.DRAFT_UP, 1 if up else -1)
            self._told(up)

    # ---- the thread that looks after it ------------------------------------------------------------------------

    def look(self) -> bool:
        """One look, and what follows from it. False: there is nothing to look after any more."""
        now = self._clock()
        gap, self._looked_at = now - self._looked_at, now
        present = self._present
        if present is not None:
            if not present.alive:
                self._end(present, "has ended")
            elif self._hangs(present, gap):
                self._end(present, f"has not read a step for {self._hung_for:.1f} s and was ended", hung=True)
        elif not self._left_off and now >= self._again_at:
            self._start_again()
        return not self._left_off

    def _hangs(self, present: Channel, gap: float) -> bool:
        """Whether the present life has left a step unread for too long."""
        stalled, watched = present.stalled_seconds, min(gap, _LONGEST_GAP)
        self._hung_for = min(stalled, watched) if stalled <= gap else self._hung_for + watched
        return self._hung_for >= self._hang

    def _end(self, present: Channel, trouble: str, hung: bool = False) -> None:
        with self._lock:
            if self._present is None:  # `close` has it
                return
            self._present = None
        self._say(up=False)
        self._close(present)
        good = self._clock() - self._began_at >= self._care.good_life
        if good or self._useful or self._hits() > self._hits_before:
            self._failures = 0
        if good:
            self._ends = 0
        if hung:
            self._hang = min(2 * self._hang, max(self._care.longest_hang, self._care.hang))
        elif good:
            self._hang = self._care.hang
        self._plan(trouble)

    def _plan(self, trouble: str) -> None:
        """After a life that ended, or never began: when the next one is started, if ever."""
        if self._failures >= self._restarts:
            self._left_off = True
            self._page.count_in(counters.DRAFT_LEFT_OFF, 1)
            self._log.error(
                "The draft side %s. After %d restarts in a row it is left off: decoding goes on without drafts as long "
                "as this engine runs.",
                trouble,
                self._failures,
            )
            return
        back_off = min(self._care.first_back_off * 2 ** min(self._ends, 30), self._care.longest_back_off)
        self._failures += 1
        self._ends += 1
        self._again_at = self._clock() + back_off
        self._log.warning(
            "The draft side %s. Decoding goes on without drafts until it is back; it is started again in %g s (restart "
            "%d of %d in a row).",
            trouble,
            back_off,
            self._failures,
            self._restarts,
        )

    def _ask_again(self, refusal: NotAdmitted) -> None:
        """A pool does not take us: that is no failure of it. It is asked now and then, for as long as this lasts."""
        self._again_at = self._clock() + self._care.longest_back_off
        if str(refusal) != self._refused_for:
            self._refused_for = str(refusal)
            self._log.warning(
                "The draft pool does not take this engine: %s. Decoding goes on without drafts, and it is asked again "
                "every %g s.",
                refusal,
                self._care.longest_back_off,
            )

    @staticmethod
    def _look_for_room(channel: Channel) -> None:
        """The thread does not wait for room, it looks again and again."""
        if isinstance(channel, Placed):
            channel.wait_for_room(0.0)

    def _start_again(self) -> None:
        """Begin the next life; or the one that was asked for before, as soon as there is room for it."""
        channel = self._starting
        try:
            if channel is None:
                channel = self._start()
                self._look_for_room(channel)
                with self._lock:
                    self._starting = channel
            if not self._closing.is_set():  # else `close` may have looked before there was anything to close
                channel.wait_until_ready()
        except NoRoom:
            return
        except NotAdmitted as refusal:
            if channel is not None:
                self._take_back(channel)
            self._ask_again(refusal)
            return
        except Exception as error:  # whatever it is, it must not end the thread that would try again
            self._count_restart()
            if channel is not None:
                self._take_back(channel)
            if not self._closing.is_set():
                self._plan(f"did not come up ({error})")
            return
        self._count_restart()
        if self._closing.is_set():
            self._take_back(channel)
            return
        with self._lock:
            if self._starting is None:  # `close` has it
                return
            # First: a request that is told to this life must not be measured by what none could hold.
            self.max_length = channel.max_length
            self._starting, self._present = None, channel
            self._life += 1
            self._useful, self._refused_for = False, ""
            self._last_read.clear()
        self._hung_for, self._began_at, self._looked_at = 0.0, self._clock(), self._clock()
        self._hits_before = self._hits()
        self._say(up=True)

    def _count_restart(self) -> None:
        if not self._first_waits:
            self._page.count_in(counters.DRAFT_RESTARTS, 1)
        self._first_waits = False

    def _take_back(self, starting: Channel) -> None:
        """Close a life that has not begun, unless `close` does."""
        with self._lock:
            mine, self._starting = self._starting is starting, None
        if mine:
            self._close(starting)

    def _close(self, channel: Channel) -> None:
        try:
            channel.close()
        except Exception:  # the next life must not fail for it
            self._log.exception("A draft side that has ended could not be closed.")


def _look_after(channel: weakref.ref[RestartingChannel], closing: threading.Event, seconds: float) -> None:
    while not closing.wait(seconds):
        owner = channel()
        if owner is None or not owner.look():
            return
        del owner
