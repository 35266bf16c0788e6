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
        self._session, self._server, self._stop = session, server, stop
        self._places = asyncio.Semaphore(concurrency)
        self._done, self._fault_done = done, fault_done
        self._lost: set[int] = set()
        self._episodes: dict[Episode, asyncio.Task[None]] = {}
        self._share = 0

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
                    while waiting and waiting[0].position <= asked.index and not self._stop.is_set():
                        await self._fault_over(float("inf"))
                        fault = waiting.pop(0)
                        share = (waiting[0].position if waiting else requests[-1].index + 1) - fault.position
                        self._begin(fault, share, seed, patience)
                    next_fault = waiting[0].position - asked.index if waiting else len(requests) - place
                    await self._until_it_may(asked, next_fault, patience)
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

    async def _until_it_may(self, asked: Asked, next_fault: int, patience: float) -> None:
        """The pauses of the request's mood; during a fault there are none. `next_fault`: requests until the next one.

        Of the requests before it, the second half is spread over the time in which hits may come back: there must be
        traffic for that.
        """
        if any(not episode.over for episode in self._episodes):
            if next_fault < self._share / 2:
                await self._fault_over(patience / max(1, next_fault))
            return
        if asked.pause:
            await self._sleep(asked.pause)
        if asked.mood == "alone":
            while self.in_flight and not self._stop.is_set():
                await asyncio.sleep(0.005)

    async def _fault_over(self, seconds: float) -> None:
        """Wait so long at most for the end of the fault that is being done."""
        deadline = time.monotonic() + seconds
        while any(not episode.over for episode in self._episodes) and time.monotonic() < deadline:
            if self._stop.is_set():
                return
            await asyncio.sleep(0.05)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return

    def _begin(self, planned: Planned, share: int, seed: int, patience: float) -> None:
        self._share = share
        episode = Episode(planned, seed, patience, self.gaps, lambda: set(self.in_flight))
        self._episodes[episode] = asyncio.create_task(episode.run(self._session, self._server))

    async def _end_faults(self) -> None:
        for episode, task in list(self._episodes.items()):
            if self._stop.is_set() and not episode.over:
                task.cancel()
                del self._episodes[episode]
            await asyncio.wait({task})
            if not task.cancelled():
                await task  # what went wrong in it is our own error
                self._settle(episode)

    def _settle(self, episode: Episode) -> None:
        """Write down a fault that is over and whose requests have all ended."""
        if episode.over and not episode.in_flight & self.in_flight and episode in self._episodes:
            del self._episodes[episode]
            self._fault_done(episode.record(len(episode.in_flight & self._lost)))
