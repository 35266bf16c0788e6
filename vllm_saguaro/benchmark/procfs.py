"""Processor time as Linux counts it: of cores, and of a worker with all the processes that it started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def busy_seconds(cores: Iterable[int]) -> float:
    """Seconds in which these cores were not idle since boot, added up."""
    lines = (line.split() for line in (_PROC / "stat").read_text().splitlines())
    wanted = {f"cpu{core}" for core in cores}
    return sum(_busy_ticks(line[1:]) for line in lines if line and line[0] in wanted) * _TICK


def _busy_ticks(fields: list[str]) -> int:
    """One `cpuN` line: user, nice, system, idle, iowait, irq, softirq, steal (guest time is part of user)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return user + nice + system + irq + softirq + steal


def busy_share(cores: Iterable[int], seconds: float = 1.0) -> float:
    """How busy these cores are now, 0 to 1, watched for so many seconds."""
    cores = list(cores)
    before, start = busy_seconds(cores), time.perf_counter()
    time.sleep(seconds)
    return (busy_seconds(cores) - before) / ((time.perf_counter() - start) * len(cores))


def session_seconds(session: int) -> float:
    """Processor seconds of the live processes of one session (`setsid`): a worker and everything below it.

    A process that ends takes its time with it: a difference of two readings may miss it, which does no harm here.
    """
    return sum(seconds for owner, seconds in _processes() if owner == session)


def _processes() -> Iterable[tuple[int, float]]:
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it has ended in the meantime
            continue
        fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks; fields[0] is the state
        yield int(fields[3]), (int(fields[11]) + int(fields[12])) * _TICK


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in (_PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def share_of_others(cores: Sequence[int], own: Callable[[], float]) -> Callable[[], float]:
    """From now on: a call gives the share of these cores' time that others have taken since then.

    `own`: processor seconds so far of those who are no others.
    """

    def readings() -> tuple[float, float]:
        return time.perf_counter() * len(cores), busy_seconds(cores) - own()

    before = readings()

    def share() -> float:
        capacity, foreign = (now - then for now, then in zip(readings(), before, strict=True))
        return max(0.0, foreign) / capacity

    return share
