"""Whether the answers are plain vLLM's: each request of the pool is asked of it once, and again where ours differ."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from scripts.faulting.streams import POOL, Pool, Told
from scripts.soaking import client
from scripts.soaking.answers import Answer
from scripts.soaking.references import COMPANIONS, TOP_LOGPROBS, difference, gap_between, judge

MOST_JUDGED = 40
"""Beyond so many different answers there is nothing to find out by asking again: they are wrong."""


@dataclass
class Texts:
    """What was compared. `ties`, `wrong`: a line for each answer that is not the one that plain vLLM gave at first;
    of a tie, plain vLLM itself says either (`soaking/references.py`).
    """

    compared: int = 0
    equal: int = 0
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


async def compare(
    session: aiohttp.ClientSession, url: str, pool: Pool, told: Iterable[Told], say: Callable[[str], None]
) -> Texts:
    """Ask the plain server at `url` for every text that can be compared, and compare."""
    asked = pool.comparable()
    theirs = await asyncio.gather(*(client.ask(session, url, each) for each in asked))
    references = {answer.index: answer for answer in theirs}
    found, judged = Texts(), 0
    for answer in (each.answer for each in told if not each.lost):
        reference = references.get(answer.index % POOL)
        if reference is None:
            continue
        found.compared += 1
        differs = difference(answer, reference)
        if not differs:
            found.equal += 1
            continue
        judged += 1
        if judged > MOST_JUDGED:
            found.wrong.append(f"request {answer.index}: {differs}")
            continue
        await _judge(session, url, pool, answer, reference, found)
        say(f"request {answer.index} is not what plain vLLM said: {differs}")
    return found


async def _judge(
    session: aiohttp.ClientSession, url: str, pool: Pool, ours: Answer, theirs: Answer, found: Texts
) -> None:
    """Ask plain vLLM again, alone and with company."""
    asked = pool.request(ours.index)
    again = []
    for companions in COMPANIONS:
        rows = [asked, *(pool.request(ours.index + 1 + number) for number in range(companions))]
        again.append((await asyncio.gather(*(client.ask(session, url, row) for row in rows)))[0])
    gap = gap_between(asked, ours, theirs, await client.likeliest(session, url, asked.alone(TOP_LOGPROBS)))
    verdict = judge(asked, ours, theirs, again, gap)
    (found.ties if verdict.tie else found.wrong).append(f"request {ours.index}: {verdict.why}")
