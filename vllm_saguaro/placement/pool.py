"""A draft pool: one draft model for several engines, each with a link, a loop and a share of the KV blocks of its own.

An engine's requests are known to its own loop alone, and that loop's tables go into its own link. So which engine a
request is of does not depend on anything that is said over a link, and no engine can speak for another. What is shared
is the model, and with it time: engines take turns, forward by forward.

One thread drafts (`run`). Others may ask for admission, bring a link, and wait until it has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.kv import Blocks
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE, DraftLoop
from vllm_saguaro.drafting.model import DraftModel
from vllm_saguaro.drafting.shares import BlockShare, BlockShares, fair_parts
from vllm_saguaro.placement.admission import Ask, Room, check_agreement, check_room
from vllm_saguaro.placement.channel import NotAdmitted
from vllm_saguaro.placement.draft_end import (
    NAP_SECONDS,
    SLEEP_MILLISECONDS,
    YIELD_SECONDS,
    InvitedEnd,
    TargetGone,
)
from vllm_saguaro.placement.mailbox import DraftState

_STEPS_A_TURN = 64
"""Steps of one engine that are taken before the others are looked at again."""
_FAILURES = 2
"""Forwards that fail in a row, of whichever engines, until the model itself counts as broken."""


class PoolBroken(Exception):
    """Nothing can be drafted any more."""


@dataclass(eq=False, slots=True)
class Place:
    """An engine's place in the pool, from its admission on. `number` is the engine's id here, never given twice."""

    number: int
    ask: Ask
    ended: threading.Event = field(default_factory=threading.Event)
    reason: str = ""
    """Why it has ended."""


@dataclass(eq=False, slots=True)
class Member:
    """An engine that is drafted for."""

    place: Place
    end: InvitedEnd
    loop: DraftLoop
    blocks: BlockShare
    told: int = 0
    """Steps of it that were no steps, as far as the log has them."""


class DraftPool:
    """The engines that share one draft model."""

    def __init__(
        self,
        model: DraftModel,
        make_engine: Callable[[Ask, Blocks], DraftEngine],
        first: Ask,
        engines: int,
        log: logging.Logger,
        linger: float = 60.0,
    ) -> None:
        """`make_engine(ask, blocks)`: what drafts for an engine. `first`: what the engine asked for that started this
        pool; all others have to agree. `engines`: how many there is room for. `linger`: seconds without any engine
        after which the pool ends.
        """
        self._make_engine, self._first, self._log, self._linger = make_engine, first, log, linger
        self._room = Room(engines, model.max_rows, model.num_blocks, model.block_size, model.max_length)
        self._shares = BlockShares(model.num_blocks)
        self._members: deque[Member] = deque()
        """The next one's turn is the first one's."""
        self._lock = threading.Lock()
        self._places: list[Place] = []
        self._newcomers: list[tuple[Place, InvitedEnd]] = []
        self._ending = False
        self._numbers = 0
        self._failures = 0
        self._empty_since = self._beat = time.monotonic()
        self._bell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # ---- other threads -----------------------------------------------------------------------------------------

    @property
    def silent_seconds(self) -> float:
        """How long the drafting thread has been busy with one thing."""
        return time.monotonic() - self._beat

    def has_begun(self, place: Place) -> bool:
        """Whether the drafting thread has taken this engine in."""
        with self._lock:
            return all(newcomer is not place for newcomer, _ in self._newcomers)

    def touch(self) -> bool:
        """Somebody is about to come: stay for as long as one who has just left. False: it is ending already."""
        with self._lock:
            self._empty_since = time.monotonic()
            return not self._ending

    def admit(self, ask: Ask) -> Place:
        """A place for an engine; `bring` or `give_up` must follow. Raises `NotAdmitted`."""
        check_agreement(ask, self._first)
        with self._lock:
            if self._ending:
                raise NotAdmitted("the pool is ending")
            check_room(ask, [place.ask for place in self._places], self._room)
            self._numbers += 1
            place = Place(self._numbers, ask)
            self._places.append(place)
        return place

    def bring(self, place: Place, end: InvitedEnd) -> None:
        """The link of an engine that was admitted. From now on it is the drafting thread's."""
        with self._lock:
            comes_in = not self._ending
            if comes_in:
                self._newcomers.append((place, end))
                os.eventfd_write(self._bell_fd, 1)  # under the lock: at the end of the pool its number is another's
        if not comes_in:
            self._turn_away(place, end)

    def give_up(self, place: Place, reason: str) -> None:
        """An engine has no place any more."""
        with self._lock:
            self._places.remove(place)
            self._empty_since = time.monotonic()
        place.reason = reason
        place.ended.set()

    # ---- the drafting thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Draft until no engine has been here for a while. Raises `PoolBroken` when the model fails again and again."""
        busy_at = time.perf_counter()
        try:
            while not self._is_over():
                self._let_in()
                if self.turn():
                    busy_at = time.perf_counter()
                else:
                    self._rest(busy_at)
        finally:
            with self._lock:
                self._ending = True
                newcomers, self._newcomers = self._newcomers, []
            for place, end in newcomers:
                self._turn_away(place, end)
            for member in list(self._members):
                self._remove(member, "the pool has ended")
            os.close(self._bell_fd)

    def turn(self) -> bool:
        """Take in what all engines say, then the next forward of the next one that has something to do."""
        self._beat = time.monotonic()
        heard = [self._try(member, self._hear) for member in list(self._members)]
        self._share_rows()
        for _ in range(len(self._members)):
            member = self._members[0]
            self._members.rotate(-1)
            if self._try(member, self._advance):
                return True
        return any(heard)

    def _hear(self, member: Member) -> bool:
        """Take in an engine's steps; whether there were any."""
        member.end.check()
        mailbox, taken = member.end.mailbox, 0
        while taken < _STEPS_A_TURN and (step := mailbox.receive()) is not None:
            member.loop.submit(step)
            taken += 1
        if mailbox.dropped > 2 * member.told:
            member.told = mailbox.dropped
            self._log.warning(
                "Saguaro's draft pool dropped what was no step of engine %d (%d so far).",
                member.place.number,
                member.told,
            )
        return taken > 0

    def _advance(self, member: Member) -> bool:
        """One forward for an engine; whether there was anything to do."""
        try:
            done = not member.loop.rests and member.loop.advance()
        except TargetGone:
            raise
        except Exception as error:
            self._failures += 1
            if self._failures >= _FAILURES:
                raise PoolBroken(f"drafting failed {self._failures} times in a row, at last with: {error}") from error
            raise
        if done:
            self._failures = 0
        return done

    def _try(self, member: Member, act: Callable[[Member], bool]) -> bool:
        """What goes wrong with one engine ends its own link, and nothing else."""
        try:
            return act(member)
        except PoolBroken:
            raise
        except TargetGone as gone:
            self._remove(member, str(gone))
        except Exception as error:
            self._log.exception("Saguaro's draft pool failed for engine %d, and has let it go.", member.place.number)
            self._remove(member, f"the draft pool failed for this engine: {error}")
        return False

    def _share_rows(self) -> None:
        """As many branches for each as all may have together, fairly shared out among those that have requests."""
        parts = fair_parts([member.loop.demand for member in self._members], MAX_ROWS_A_TREE)
        working = sum(part > 0 for part in parts)
        for member, part in zip(self._members, parts, strict=True):
            member.loop.rows, member.loop.alone = max(part, 1), working < 2

    def _let_in(self) -> None:
        with self._lock:
            newcomers, self._newcomers = self._newcomers, []
        for place, end in newcomers:
            blocks = self._shares.join()
            member = None
            try:
                engine = self._make_engine(place.ask, blocks)
                member = Member(place, end, DraftLoop(engine, end.mailbox.publish, end.mailbox.note), blocks)
                self._members.append(member)
                end.mailbox.announce(DraftState.READY, self._room.max_length)
                self._log.info(
                    "Saguaro's draft pool drafts for engine %d (%s); %d of %d are here.",
                    *(place.number, place.ask.engine, len(self._members), self._room.engines),
                )
            except Exception as error:
                if member is not None:
                    self._remove(member, str(error))
                    continue
                self._shares.leave(blocks)
                self._hang_up(end)
                self.give_up(place, str(error))

    def _remove(self, member: Member, reason: str) -> None:
        """An engine has left. Its loop's trees are at rest, since nobody is in a forward: all its blocks are free."""
        self._members.remove(member)
        self._shares.leave(member.blocks)
        self._hang_up(member.end)
        self._log.info("Saguaro's draft pool: engine %d has left (%s).", member.place.number, reason)
        self.give_up(member.place, reason)

    def _turn_away(self, place: Place, end: InvitedEnd) -> None:
        """An engine that comes when the pool is over."""
        self._hang_up(end)
        self.give_up(place, "the pool has ended")

    @staticmethod
    def _hang_up(end: InvitedEnd) -> None:
        # BufferError: a failure's traceback still looks at the memory. The mapping then goes with that.
        with contextlib.suppress(OSError, BufferError):
            end.close()

    def _is_over(self) -> bool:
        with self._lock:
            alone = not self._places and time.monotonic() - self._empty_since >= self._linger
            self._ending = self._ending or alone
            return self._ending

    def _rest(self, since: float) -> None:
        """Wait a little for the next step: at first by yielding, later asleep until any engine or a newcomer rings."""
        waited = time.perf_counter() - since
        if waited < YIELD_SECONDS:
            os.sched_yield()
        elif waited < NAP_SECONDS or any(map(self._rings_no_bell, self._members)):
            time.sleep(50e-6)
        else:
            self._sleep()

    @staticmethod
    def _rings_no_bell(member: Member) -> bool:
        """Whether there may be something to do without a step: for a device's record, or a tree whose rest is over."""
        return member.loop.growing or (member.end.mailbox.from_device and len(member.loop) > 0)

    def _sleep(self) -> None:
        poll, asleep = select.poll(), True
        poll.register(self._bell_fd, select.POLLIN)
        lying: list[Member] = []
        for member in list(self._members):
            lying.append(member)
            asleep = self._try(member, lambda one: self._lie_down(one, poll)) and asleep
        if asleep:
            poll.poll(min(SLEEP_MILLISECONDS, 1000 * self._linger))
        for member in lying:
            if member in self._members:
                self._try(member, self._get_up)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell_fd)

    @staticmethod
    def _get_up(member: Member) -> bool:
        member.end.get_up()
        return True

    @staticmethod
    def _lie_down(member: Member, poll: select.poll) -> bool:
        """Whether this engine has nothing to say."""
        place = member.end.lie_down()
        if place is not None:
            poll.register(*place)
        return place is not None
