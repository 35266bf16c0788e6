"""One stretch of a soak: from the start of a server to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from scripts.soaking import client, metrics
from scripts.soaking.answers import Answer
from scripts.soaking.faults import Planned
from scripts.soaking.feeder import Feeder
from scripts.soaking.holdings import by_name, watch
from scripts.soaking.journal import Journal
from scripts.soaking.references import (
    COMPANIONS,
    MOST_ASKED_AGAIN,
    TOP_LOGPROBS,
    Again,
    difference,
    gap_between,
    judge,
)
from scripts.soaking.server import Server, VllmServer
from scripts.soaking.settings import Settings
from scripts.soaking.stalls import Gaps
from scripts.soaking.traffic import Asked, Traffic
from vllm_saguaro.benchmark import provenance
from vllm_saguaro.benchmark.settings import allowed_cores

QUIET_SECONDS = 60.0
"""So long may it take until a server that is asked nothing says that nothing runs and no block is in use."""
SETTLE_SECONDS = 3.0
"""Closed connections and idle threads are gone after this."""

Say = Callable[[str], None]


class Stretch:
    """Asks a server what is still to be asked, and writes what it finds into the journal."""

    def __init__(self, settings: Settings, traffic: Traffic, journal: Journal, stop: asyncio.Event, say: Say) -> None:
        self._settings, self._traffic, self._journal, self._stop, self._say = settings, traffic, journal, stop, say

    async def soak(self, log: Path, todo: Sequence[int], faults: Sequence[Planned]) -> None:
        """The requests `todo` to saguaro, the first of them as a warm-up, and the faults that are not done yet."""
        about = provenance.collect(allowed_cores())
        server = VllmServer(self._settings, plain=False, log=log)
        found: dict[str, Any] = {"provenance": about, "first": todo[0]}
        try:
            found["start_seconds"] = round(await server.wait_until_up(), 1)
            await self.traffic(server, todo, faults, found)
            found["ended_by_itself"] = not server.alive
            found["log"] = _log_counts(server.log_text())
            found["end"] = asdict(await asyncio.to_thread(server.end))
            self._journal.add("stretch", **found)
        finally:
            server.kill()

    async def traffic(
        self, server: Server, todo: Sequence[int], faults: Sequence[Planned], found: dict[str, Any]
    ) -> None:
        """All of it to a server that is up; what is measured goes into `found`."""
        requests = [self._traffic.request(index) for index in todo]
        warm = min(self._settings.warm_up, len(todo) // 4)
        begin = time.monotonic()
        async with client.open_session() as session:
            feeder = Feeder(
                session,
                server,
                self._settings.concurrency,
                self._stop,
                self._answered("answer", begin),
                self._fault_done,
            )
            await feeder.run(requests[:warm])
            await quiet(session, server)
            feeder.gaps = Gaps()  # what is compiled and cached once is not usual
            found["before"] = by_name(server.snapshot())
            found["memory"] = []
            watching = asyncio.create_task(watch(server, found["memory"]))
            try:
                await feeder.run(requests[warm:], faults, self._settings.seed, self._settings.hits_patience)
            finally:
                watching.cancel()
            found["cut_short"] = feeder.cut_short
            found["idle"] = await quiet(session, server)
            found["counted"] = metrics.numbers(await metrics.look(session, server.url), metrics.COUNTED)
            found["after"] = by_name(server.snapshot())
        found["seconds"] = round(time.monotonic() - begin, 1)
        found["usual_gaps"] = {str(place): count for place, count in sorted(feeder.gaps.usual.items())}
        found["longest_usual_gap"] = round(feeder.gaps.longest_usual, 4)

    async def refer(self, log: Path, todo: Sequence[int]) -> None:
        """The requests `todo` to plain vLLM; then those again whose answers differ."""
        server = VllmServer(self._settings, plain=True, log=log)
        try:
            await server.wait_until_up()
            found: dict[str, Any] = {}
            await self.references(server, todo, found)
            await asyncio.to_thread(server.end)
            self._journal.add("plain", **found)
        finally:
            server.kill()

    async def references(self, server: Server, todo: Sequence[int], found: dict[str, Any]) -> None:
        """As `refer`, to a server that is up. What it holds goes into `found`: plain vLLM grows, too."""
        requests = [self._traffic.request(index).to_the_end() for index in todo]
        warm = min(self._settings.warm_up, len(todo) // 4)
        async with client.open_session() as session:
            feeder = Feeder(
                session,
                server,
                self._settings.concurrency,
                self._stop,
                self._answered("reference", time.monotonic()),
            )
            await feeder.run(requests[:warm])
            found["before"] = by_name(server.snapshot())
            await feeder.run(requests[warm:])
            found["after"] = by_name(server.snapshot())
            for asked, ours, theirs in differing(self._traffic, self._journal):
                if self._stop.is_set() or not server.alive or len(self._journal.of("again")) >= MOST_ASKED_AGAIN:
                    break
                self._journal.add("again", **(await self._again(session, server, asked, ours, theirs)).to_json())

    async def _again(
        self, session: aiohttp.ClientSession, server: Server, asked: Asked, ours: Answer, theirs: Answer
    ) -> Again:
        """Ask plain vLLM again, alone and with company."""
        found = []
        for companions in COMPANIONS:
            beside = (self._traffic.request(asked.index + 1 + number) for number in range(companions))
            rows = [asked.to_the_end(), *(each.to_the_end() for each in beside)]
            answers = await asyncio.gather(*(client.ask(session, server.url, row) for row in rows))
            found.append(answers[0])
        gap = None
        if not asked.refused:
            logprobs = await client.likeliest(session, server.url, asked.alone(TOP_LOGPROBS))
            gap = gap_between(asked, ours, theirs, logprobs)
        again = judge(asked, ours, theirs, found, gap)
        self._say(f"request {asked.index} differs from plain vLLM: {'a tie' if again.tie else 'WRONG'}: {again.why}")
        return again

    def _answered(self, what: str, begin: float) -> Callable[[Answer], None]:
        told = begin

        def done(answer: Answer) -> None:
            nonlocal told
            self._journal.add(what, **answer.to_json())
            if answer.fate == "lost" or answer.complaint:
                self._say(f"request {answer.index}: {answer.fate}: {answer.reason or answer.complaint}")
            if time.monotonic() - told > 15:
                told = time.monotonic()
                self._say(f"{len(self._journal.of(what))} {what}s, {len(self._journal.of('fault'))} faults")

        return done

    def _fault_done(self, record: dict[str, Any]) -> None:
        self._journal.add("fault", **record)
        back = record["hits_back"]
        self._say(
            f"fault {record['number'] + 1}: {record['done']}; {len(record['in_flight'])} in flight, {record['lost']} "
            f"lost, longest stall {1e3 * record['longest_stall']:.0f} ms, "
            + ("hits did not return" if back is None else f"hits after {back:.1f} s")
        )


def differing(traffic: Traffic, journal: Journal) -> list[tuple[Asked, Answer, Answer]]:
    """Answers that are not plain vLLM's and that it has not been asked for again: each with plain vLLM's."""
    theirs = {record["index"]: Answer.from_json(record) for record in journal.of("reference")}
    settled = {record["index"] for record in journal.of("again")}
    found = []
    for record in journal.of("answer"):
        ours = Answer.from_json(record)
        if ours.index in theirs and ours.index not in settled:
            asked = traffic.request(ours.index)
            if difference(ours, theirs[ours.index]):
                found.append((asked, ours, theirs[ours.index]))
    return found


async def quiet(session: aiohttp.ClientSession, server: Server) -> dict[str, float]:
    """Wait until the server says that it has nothing to do; what it says at last."""
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        snapshot = await metrics.look(session, server.url)
        found = metrics.numbers(snapshot, metrics.IDLE) if snapshot else {}
        if (found and not any(found.values())) or time.monotonic() > deadline or not server.alive:
            await asyncio.sleep(SETTLE_SECONDS)
            return found
        await asyncio.sleep(0.25)


def _log_counts(text: str) -> dict[str, int]:
    """Lines of the log that tell of something wrong; those of the API server are about requests that it refused."""
    lines = [line for line in text.splitlines() if not line.startswith("(APIServer")]
    return {
        "errors": sum(" ERROR " in line for line in lines),
        "tracebacks": sum("Traceback (most recent call last)" in line for line in lines),
    }
