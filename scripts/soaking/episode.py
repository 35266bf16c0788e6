"""One fault from beginning to end: who was in flight, how long streams stood still, and when hits came back."""

from __future__ import annotations

import asyncio
import datetime
import random
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from scripts.soaking import metrics
from scripts.soaking.faults import ACTIONS, Planned
from scripts.soaking.server import Server
from scripts.soaking.stalls import Gaps

LOOK_SECONDS = 0.25
"""Times until hits return are known to about this."""
DRAFT_SECONDS = 60.0
"""So long may it take until there is a draft process to do something to."""


class Episode:
    """Does a fault and watches what comes of it.

    `in_flight` and the window of the gaps are as of the moment of the fault. The episode is over (`over`) when hits
    have come back, or patience has ended; its record is complete when none of its requests is in flight any more.
    """

    def __init__(
        self, planned: Planned, seed: int, patience: float, gaps: Gaps, in_flight: Callable[[], set[int]]
    ) -> None:
        self.planned = planned
        self.over = False
        self.in_flight: set[int] = set()
        self._random = random.Random(f"{seed}/fault {planned.number}")
        self._patience = patience
        self._gaps = gaps
        self._who = in_flight
        self._window = gaps.open(float("inf"))
        self._found: dict[str, Any] = {"done": "", "hits_back": None, "draft_up": None, "lasted": 0.0}

    async def run(self, session: aiohttp.ClientSession, server: Server) -> None:
        """To its end."""
        try:
            await asyncio.sleep(self._random.uniform(0, 0.5))
            pid = await self._draft(server)
            if pid is None:
                self._found["done"] = f"nothing: there was no draft process for {DRAFT_SECONDS:.0f} s"
                return
            begin = time.monotonic()
            self._window.begin, self.in_flight = begin, self._who()
            self._found["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._found["done"] = await ACTIONS[self.planned.kind](pid, self._random)
            self._found["lasted"] = round(time.monotonic() - begin, 3)
            # What was looked up while the fault was being done is counted by now.
            await asyncio.sleep(LOOK_SECONDS)
            await self._wait_for_hits(session, server, begin)
            drafts = server.drafts()
            self._found["new_process"] = bool(drafts) and pid not in drafts
        finally:
            self._window.end = time.monotonic()
            self.over = True

    def record(self, lost: int) -> dict[str, Any]:
        """All of it; `lost`: of the requests in flight, those that were lost. The gaps forget it."""
        self._gaps.forget(self._window)
        return {
            "number": self.planned.number,
            "kind": self.planned.kind,
            "position": self.planned.position,
            "in_flight": sorted(self.in_flight),
            "lost": lost,
            "longest_stall": round(self._window.longest, 4),
            **self._found,
        }

    async def _draft(self, server: Server) -> int | None:
        deadline = time.monotonic() + DRAFT_SECONDS
        while time.monotonic() < deadline and server.alive:
            drafts = server.drafts()
            if drafts:
                return self._random.choice(drafts)
            await asyncio.sleep(LOOK_SECONDS)
        return None

    async def _wait_for_hits(self, session: aiohttp.ClientSession, server: Server, begin: float) -> None:
        base = 0.0
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline and server.alive:
            snapshot = await metrics.look(session, server.url)
            if snapshot:
                hits = snapshot.total(metrics.HITS)
                # The engine needs a moment to notice that a process has ended.
                if self._found["draft_up"] is None:
                    base = hits  # what a busy engine counted late is none of the next draft's
                    if server.drafts() and snapshot.total(metrics.DRAFT_UP):
                        self._found["draft_up"] = round(time.monotonic() - begin, 2)
                if hits > base:
                    self._found["hits_back"] = round(time.monotonic() - begin, 2)
                    return
            await asyncio.sleep(LOOK_SECONDS)
