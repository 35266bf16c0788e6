"""A steady number of streaming requests, one after the other, and what became of each."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass

import aiohttp

from scripts.faulting.settings import Settings
from scripts.soaking import client
from scripts.soaking.answers import Answer, Fate
from scripts.soaking.pair import MODEL_NAME
from scripts.soaking.server import Server
from scripts.soaking.stalls import Gaps
from scripts.soaking.traffic import Asked

POOL = 32
"""Different requests; they come round again and again."""
TOKENS = (96, 224)
LONGEST_PROMPT = 200
"""Characters."""
_AFTER_A_LOSS_SECONDS = 0.5


class Pool:
    """Request `index` is a function of the seed and of its place in the pool. Half of them are greedy, a quarter has a
    seed, a quarter is sampled without one.
    """

    def __init__(self, settings: Settings) -> None:
        lines = settings.prompt_path.read_text(encoding="utf-8").splitlines()
        self._prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
        self._seed = settings.seed

    def request(self, index: int) -> Asked:
        """Always the same for an index, and for all of its place."""
        place = index % POOL
        r = random.Random(f"{self._seed}/{place}")
        text = r.choice(self._prompts)
        start = r.randrange(max(1, len(text) // 2))
        body = {
            "model": MODEL_NAME,
            "prompt": text[start : start + r.randint(20, LONGEST_PROMPT)],
            "max_tokens": r.randint(*TOKENS),
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "temperature": 0 if place % 2 == 0 else 1,
        }
        if place % 4 == 1:
            body["seed"] = r.randrange(2**31)
        return Asked(index, body, mood="steady")

    def comparable(self) -> list[Asked]:
        """One request for each place whose text plain vLLM must have, too."""
        return [asked for asked in map(self.request, range(POOL)) if asked.comparable]


@dataclass(frozen=True)
class Told:
    """An answer, with the seconds of a monotonic clock at which it was asked for and over."""

    answer: Answer
    begin: float
    end: float

    @property
    def lost(self) -> bool:
        """Whether it failed, or is not of the form that was asked for."""
        return self.answer.fate != Fate.FINISHED or bool(self.answer.complaint)


class Streams:
    """Keeps `concurrency` requests in flight from `run` until `stop`."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, pool: Pool, concurrency: int) -> None:
        self.gaps = Gaps()
        self.in_flight: set[int] = set()
        self.told: list[Told] = []
        self._session, self._server, self._pool = session, server, pool
        self._concurrency = concurrency
        self._indices = itertools.count()
        self._stopped = False

    async def run(self) -> None:
        """Ask until `stop`, and wait for all answers."""
        self._stopped = False
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._one_after_the_other())

    def stop(self) -> None:
        """What is in flight comes to its end."""
        self._stopped = True

    async def _one_after_the_other(self) -> None:
        while not self._stopped and self._server.alive:
            asked = self._pool.request(next(self._indices))
            self.in_flight.add(asked.index)
            begin = time.monotonic()
            try:
                answer = await client.ask(self._session, self._server.url, asked, self.gaps.piece)
            finally:
                self.in_flight.discard(asked.index)
            self.told.append(Told(answer, begin, time.monotonic()))
            if self.told[-1].lost:
                await asyncio.sleep(_AFTER_A_LOSS_SECONDS)
