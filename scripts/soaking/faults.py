"""What is done to the draft process, and when: as reproducible as the traffic."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.soaking.processes import is_alive
from scripts.soaking.settings import Settings

STOP_SECONDS = 30.0
"""A stopped draft process goes on after so long, unless it has been ended in the meantime."""
MEMORY_SECONDS = 15.0
"""A draft process that can do without more memory for so long gets its limits back."""
SLOW_SECONDS = 5.0
SLOW_TURN_SECONDS = (0.02, 0.25)
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Planned:
    """A fault that comes when request `position` is about to be sent."""

    number: int
    kind: str
    position: int


def plan(settings: Settings) -> list[Planned]:
    """All faults, spread over the requests after the warm-up, each somewhere in its share of them."""
    r = random.Random(f"{settings.seed}/faults")
    kinds = [kind for kind, count in sorted(settings.faults.items()) for _ in range(count)]
    r.shuffle(kinds)
    share = (settings.requests - settings.warm_up) / max(1, len(kinds))
    # In the first half of its share, so that there is traffic left to see what comes of it.
    places = [settings.warm_up + int((number + r.uniform(0, 0.5)) * share) for number in range(len(kinds))]
    return [Planned(number, kind, place) for number, (kind, place) in enumerate(zip(kinds, places, strict=True))]


async def kill(pid: int, r: random.Random) -> str:
    """SIGKILL."""
    _signal(pid, signal.SIGKILL)
    await _gone(pid, 5.0)
    return "SIGKILL"


async def stop(pid: int, r: random.Random) -> str:
    """SIGSTOP, and SIGCONT much later, unless somebody has ended it before."""
    begin = time.monotonic()
    _signal(pid, signal.SIGSTOP)
    try:
        gone = await _gone(pid, STOP_SECONDS)
    finally:
        _signal(pid, signal.SIGCONT)
    took = time.monotonic() - begin
    return f"SIGSTOP, ended after {took:.1f} s" if gone else f"SIGSTOP, SIGCONT after {took:.1f} s"


async def exhaust(pid: int, r: random.Random) -> str:
    """Its address space and its data may grow no further (prlimit), for a while."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    try:
        former = [resource.prlimit(pid, limit) for limit in limits]
        sizes = _sizes(pid)
        for limit, size, (_, hard) in zip(limits, sizes, former, strict=True):
            resource.prlimit(pid, limit, (size, hard))
    except (ProcessLookupError, FileNotFoundError):
        return "gone before its memory could be limited"
    begin = time.monotonic()
    try:
        gone = await _gone(pid, MEMORY_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            for limit, values in zip(limits, former, strict=True):
                resource.prlimit(pid, limit, values)
    took = time.monotonic() - begin
    if gone:
        return f"no more memory, it ended after {took:.1f} s"
    return f"no more memory for {took:.1f} s, it went on"


async def slow(pid: int, r: random.Random) -> str:
    """Stopped and let go on in turns of random length."""
    begin, turns = time.monotonic(), 0
    try:
        while time.monotonic() - begin < SLOW_SECONDS and is_alive(pid):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                _signal(pid, number)
                await asyncio.sleep(r.uniform(*SLOW_TURN_SECONDS))
            turns += 1
    finally:
        _signal(pid, signal.SIGCONT)
    return f"stopped {turns} times in {time.monotonic() - begin:.1f} s"


ACTIONS: dict[str, Callable[[int, random.Random], Awaitable[str]]] = {
    "kill": kill,
    "stop": stop,
    "oom": exhaust,
    "slow": slow,
}
"""Does a fault to a process, returns when it is over, and says what was done."""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def _gone(pid: int, seconds: float) -> bool:
    """Whether it ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


def _sizes(pid: int) -> tuple[int, int]:
    """Bytes of its address space and of its data now."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[5]) * resource.getpagesize()
