"""Sends the requests of one stretch, and writes down what became of each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import aiohttp

from scripts.soaking import client
from scripts.soaking.answers import Answer, Fate
from scripts.soaking.episode import Episode
from scripts.soaking.faults import Planned
from scripts.soaking.server import Server
from scripts.soaking.stalls import Gaps
from scripts.soaking.traffic import Asked


class Feeder:
    """At most `concurrency` requests at a time, in order, at their own pace. `stop`: set when no more may be sent.

    `done` is told of every answer as soon as it is there. Faults are done one at a time, each when the request of its
    position is about to be sent; its record goes to `fault_done`.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: Server,
        concurrency: int,
        stop: asyncio.Event,
        done: Callable[[Answer], None],
        fault_done: Callable[[dict[str, object]], None] = lambda record: None,
    ) -> None:
        self.gaps = Gaps()
        self.in_flight: set[int] = set()
        self.cut_short: list[int] = []
        """Numbers of the faults that `stop` came into: they count as not done, and their draft may still be gone."""
        self._session, self._server, self._stop = session, server, stop
        self._places = asyncio.Semaphore(concurrency)
        self._done, self._fault_done = done, fault_done
        self._lost: set[int] = set()
        self._episodes: dict[Episode, asyncio.Task[None]] = {}
        self._share = self._sent = 0

    async def run(
        self, requests: Sequence[Asked], faults: Iterable[Planned] = (), seed: int = 0, patience: float = 60.0
    ) -> None:
        """Send all of them (or as many as may be) and wait for every answer and the end of every fault.

        A fault that was cut short by `stop` has no record: it counts as not done.
        """
        waiting = sorted(faults, key=lambda fault: fault.position)
        try:
            async with asyncio.TaskGroup() as group:
                for place, asked in enumerate(requests):
                    # One that is due while another is being done waits: without traffic that would have no end.
                    if waiting and waiting[0].position <= asked.index and not (self._busy or self._stop.is_set()):
                        self._begin(waiting.pop(0), seed, patience)
                        until_next = waiting[0].position - asked.index if waiting else 0
                        left = (len(requests) - place) / (len(waiting) + 1)
                        # Where a run is gone on with, several may be due at once.
                        self._share, self._sent = max(until_next, int(left) // 2), 0
                    await self._until_it_may(asked, patience)
                    if self._stop.is_set() or not self._server.alive:
                        break
                    await self._places.acquire()
                    self.in_flight.add(asked.index)
                    group.create_task(self._one(asked))
            await self._end_faults()
        finally:
            for task in self._episodes.values():
                task.cancel()

    async def _one(self, asked: Asked) -> None:
        try:
            answer = await client.ask(self._session, self._server.url, asked, self.gaps.piece)
            if answer.fate == Fate.LOST:
                self._lost.add(asked.index)
            self._done(answer)
        finally:
            self.in_flight.discard(asked.index)
            self._places.release()
        for episode in list(self._episodes):
            self._settle(episode)

    @property
    def _busy(self) -> bool:
        """Whether a fault is being done."""
        return any(not episode.over for episode in self._episodes)

    async def _until_it_may(self, asked: Asked, patience: float) -> None:
        """The pauses of the request's mood; during a fault there are none.

        Of a fault's share of the requests, the second half is spread over the time in which hits may come back: there
        must be traffic for that.
        """
        if self._busy:
            self._sent += 1
            left = self._share - self._sent
            if left < self._share / 2:
                await self._fault_over(patience / max(1, left))
            return
        if asked.pause:
            await self._sleep(asked.pause)
        if asked.mood == "alone":
            while self.in_flight and not self._stop.is_set():
                await asyncio.sleep(0.005)

    async def _fault_over(self, seconds: float) -> None:
        """Wait so long at most for the end of the fault that is being done."""
        deadline = time.monotonic() + seconds
        while self._busy and time.monotonic() < deadline:
            if self._stop.is_set():
                return
            await asyncio.sleep(0.05)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return

    def _begin(self, planned: Planned, seed: int, patience: float) -> None:
        episode = Episode(planned, seed, patience, self.gaps, lambda: set(self.in_flight))
        self._episodes[episode] = asyncio.create_task(episode.run(self._session, self._server))

    async def _end_faults(self) -> None:
        for episode, task in list(self._episodes.items()):
            if self._stop.is_set() and not episode.over:
                task.cancel()
                del self._episodes[episode]
                self.cut_short.append(episode.planned.number)
            await asyncio.wait({task})
            if not task.cancelled():
                await task  # what went wrong in it is our own error
                self._settle(episode)

    def _settle(self, episode: Episode) -> None:
        """Write down a fault that is over and whose requests have all ended."""
        if episode.over and not episode.in_flight & self.in_flight and episode in self._episodes:
            del self._episodes[episode]
            self._fault_done(episode.record(len(episode.in_flight & self._lost)))
