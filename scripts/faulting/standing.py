"""Where the time of a gap went: which thread ran, which one waited for a core, and what the host took for itself.

A stream stands still when anybody between the model and its reader does: the worker that computes, the engine core, the
server that answers, or the reader (this process). Linux counts for each thread how long it ran, and how long it would
have run, had there been a core (`/proc/PID/schedstat`); the rest of the time it slept: waited for another one, for a
lock or for a disk. Beside an idle machine's gap the two say whether it was the engine's own, or other work's.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

READER = "reader"
"""This process."""
HOST = "host"
"""What the machine beneath a virtual one took of its cores; counted as waiting, all cores together."""
LOOK_SECONDS = 0.05
_PROC = Path("/proc")
_NANOSECONDS = 1e9
_STEAL_FIELD = 8
"""Of the first line of /proc/stat."""


@dataclass(frozen=True)
class Spent:
    """Seconds that a main thread ran, and that it waited for a core."""

    ran: float
    waited: float


class Watch:
    """Looks at the main threads of some processes, many times a second, from `with` to its end."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        """`pids`: by the name under which they are told; this process comes on top as `READER`."""
        self._pids = {**pids, READER: os.getpid()}
        self._times: list[float] = []
        self._looks: list[dict[str, Spent]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standing", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def spent(self, begin: float, end: float) -> dict[str, Spent]:
        """By name, between two moments (`time.monotonic`), to the looks around them: it may be a little more than the
        gap itself. Empty where nobody looked yet, or not any more.
        """
        count = len(self._looks)
        first = bisect.bisect_right(self._times, begin, hi=count) - 1
        last = bisect.bisect_left(self._times, end, hi=count)
        if first < 0 or last >= count:
            return {}
        before, after = self._looks[first], self._looks[last]
        return {
            name: Spent(round(now.ran - before[name].ran, 4), round(now.waited - before[name].waited, 4))
            for name, now in after.items()
            if name in before
        }

    def _watch(self) -> None:
        while True:
            look = {name: spent for name, pid in self._pids.items() if (spent := _spent_by(pid)) is not None}
            look[HOST] = Spent(0.0, _stolen())
            self._looks.append(look)
            self._times.append(time.monotonic())  # after it: who reads times finds a look for each
            if self._over.wait(LOOK_SECONDS):
                return


def to_json(spent: Mapping[str, Spent]) -> dict[str, Any]:
    """Plain values."""
    return {name: asdict(each) for name, each in spent.items()}


def most_waited(spent: Mapping[str, Spent]) -> tuple[str, float] | None:
    """Who waited longest for a core, and how long; None where nobody was watched."""
    waited = {name: each.waited for name, each in spent.items()}
    return max(waited.items(), key=lambda one: one[1]) if waited else None


def _spent_by(pid: int) -> Spent | None:
    """All that the main thread of a process has spent so far; None for one that is gone."""
    try:
        ran, waited, _ = (_PROC / str(pid) / "task" / str(pid) / "schedstat").read_text().split()
    except (OSError, ValueError):
        return None
    return Spent(int(ran) / _NANOSECONDS, int(waited) / _NANOSECONDS)


def _stolen() -> float:
    fields = (_PROC / "stat").read_text().split("\n", 1)[0].split()
    return int(fields[_STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")
