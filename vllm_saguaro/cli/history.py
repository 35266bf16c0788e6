"""What a server's metrics said, reading after reading, as far back as a page shows it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.metrics_source import NoAnswer
from vllm_saguaro.cli.reading import Reading, engines, read, uses_saguaro
from vllm_saguaro.cli.wording import rows, span

ALL: Final = "all"
"""The name under which the readings over all engines are found."""
_MOST_MOMENTS: Final = 1800
NOT_OURS: Final = (
    "{url} has no vllm:saguaro_* metrics: start the server with --speculative-config saguaro, and one API server "
    "process"
)


@dataclass(frozen=True, slots=True)
class Moment:
    """What one question to the server brought; `at` in seconds of the Unix epoch."""

    number: int
    at: float
    readings: dict[str, Reading]

    @property
    def anew(self) -> bool:
        """Whether the server had begun anew, so that all here is since its start."""
        return self.readings[ALL].seconds is None

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        readings = {engine: reading.to_json() for engine, reading in self.readings.items()}
        return {"number": self.number, "at": self.at, "anew": self.anew, "readings": readings}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no reading: what kind of trouble, one line about it, and since when (seconds of the Unix epoch)."""

    kind: str
    words: str
    since: float

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


class History:
    """The readings of one server, newest last. `ask` is for one thread, `since` for any."""

    def __init__(self, url: str, fetch: Callable[[str], Snapshot], moments: int = _MOST_MOMENTS) -> None:
        self.url = url
        self._fetch = fetch
        self._run = f"{time.time_ns():x}"
        self._lock = threading.Lock()
        self._moments: deque[Moment] = deque(maxlen=moments)
        self._next = 1
        self._last: tuple[Snapshot, float] | None = None
        self._from_start: dict[str, Reading] = {}
        self._problem: Problem | None = None

    def ask(self) -> Problem | None:
        """Read the server once more. What is wrong with it, or None."""
        try:
            snapshot = self._fetch(self.url)
        except NoAnswer as problem:
            return self._note("no answer", str(problem))
        if not uses_saguaro(snapshot):
            return self._note("no metrics of ours", NOT_OURS.format(url=self.url))
        self._add(snapshot, time.monotonic())
        return None

    def since(self, number: int, run: str) -> dict[str, Any]:
        """All moments after one, and how things stand, as plain values.

        Numbers are those of one `run`, this object's life: of another one's all moments are after any number.
        """
        with self._lock:
            moments = [moment for moment in self._moments if moment.number > number or run != self._run]
            newest = self._moments[-1].readings if self._moments else {}
            from_start, problem = self._from_start, self._problem
        return {
            "url": self.url,
            "run": self._run,
            "now": time.time(),
            "problem": problem.to_json() if problem is not None else None,
            "engines": list(from_start),
            "moments": [moment.to_json() for moment in moments],
            "from_start": {engine: reading.to_json() for engine, reading in from_start.items()},
            "table": {engine: _table(newest.get(engine), reading) for engine, reading in from_start.items()},
        }

    def _note(self, kind: str, words: str) -> Problem:
        with self._lock:
            since = self._problem.since if self._problem is not None else time.time()
            self._problem = Problem(kind, words, since)
            return self._problem

    def _add(self, snapshot: Snapshot, at: float) -> None:
        from_start = _of_each(snapshot, None, None)
        moment = None
        if self._last is not None:
            before, when = self._last
            moment = Moment(self._next, time.time(), _of_each(snapshot, before, at - when))
        self._last = snapshot, at
        with self._lock:
            self._from_start, self._problem = from_start, None
            if moment is not None:
                self._moments.append(moment)
                self._next += 1


def _of_each(now: Snapshot, before: Snapshot | None, seconds: float | None) -> dict[str, Reading]:
    """The readings over all engines and, where there are several, of each."""
    found = {ALL: read(now, before, seconds)}
    several = engines(now)
    if len(several) > 1:
        for engine in several:
            old = before.where("engine", engine) if before is not None else None
            found[f"engine {engine}"] = read(now.where("engine", engine), old, seconds)
    return found


def _table(newest: Reading | None, from_start: Reading) -> dict[str, Any]:
    """The terminal's lines, of the newest reading and of all since the server's start."""
    return {
        "span": span(newest) if newest is not None else None,
        "now": [row.to_json() for row in rows(newest)] if newest is not None else [],
        "from_start": [row.to_json() for row in rows(from_start)],
    }
