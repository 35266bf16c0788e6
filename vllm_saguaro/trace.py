"""The rounds of both sides as a trace: who was busy when, and what came of it ([docs/tracing.md]).

The target's thread puts what happened into a queue of bounded length. A thread takes it from there, with the rounds
that the draft sides have told, and writes the file. What goes wrong with the file ends the trace and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Miss, Round, Work
from vllm_saguaro.placement.channel import Traced
from vllm_saguaro.trace_file import TraceFile
from vllm_saguaro.turn import Verified

ROUNDS = 256
"""Rounds that a mailbox has room for: as many as a draft side makes in a quarter of a second, at a millisecond each."""
TARGET = 1
"""Process number of the target in the trace; those of the drafts follow."""
_EVERY_SECONDS = 0.1
_MOST_WAITING = 1 << 16
_MOST_STEPS = 4096
"""Steps whose ends are remembered, to say of each round which step it was for."""

_COUNTED = {
    "hits": (counters.HITS,),
    "not_predicted": (counters.MISSES[Miss.NOT_PREDICTED],),
    "late": (counters.MISSES[Miss.LATE],),
    "absent": (counters.MISSES[Miss.ABSENT],),
    "backups": tuple(counters.BACKUPS.values()),
}


@dataclass(slots=True)
class Event:
    """One event. `at` and `lasted` in seconds of CLOCK_MONOTONIC; None: a moment."""

    name: str
    of: int
    at: float
    lasted: float | None
    args: dict[str, int | str]


class Trace:
    """Where none is asked for: nothing is written. All times are those of `time.perf_counter`."""

    def forward_began(self) -> None:
        """A forward of the target begins."""

    def forward_ended(self, at: float, rows: Sequence[Verified]) -> None:
        """Its outcomes are known, row by row."""

    def enqueued(self, began: float, rows: int, verifying: int) -> None:
        """The host has given a step of so many rows to the device, `verifying` of them with drafts."""

    def served(self, at: float, rows: Sequence[Verified]) -> None:
        """The outcomes that were known at this time have been looked up and counted."""

    def counted(self) -> None:
        """What the device has counted so far is on the page."""

    def waited(self, began: float, ended: float, rows: int, why: str) -> None:
        """The target's thread waited for drafts of so many rows."""

    def drafted_inline(self, began: float, ended: float) -> None:
        """The target's thread was the draft side."""

    def drawing(self, drawing: bool) -> None:
        """Whether the next step has drafts at all."""

    def draft_up(self, draft: int, up: bool) -> None:
        """Whether this draft side answers from now on. From any thread."""

    def watch(self, draft: int, channel: Traced) -> None:
        """This draft side is asked what it was busy with, as long as the channel is there."""

    def close(self) -> None:
        """Write what is still to be written."""


class WrittenTrace(Trace):
    """A trace that goes to a file."""

    def __init__(self, file: TraceFile, drafts: int, page: CounterPage, log: logging.Logger) -> None:
        """`drafts`: draft sides of this engine. `page`: what the target side counts. Raises `OSError`."""
        self._file, self._page, self._log = file, page, log
        self._drafts = range(TARGET + 1, TARGET + 1 + drafts)
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._over = False
        self._writing = threading.Lock()
        self._step = 0
        self._began: float | None = None
        self._seen = dict.fromkeys(_COUNTED, 0)
        self._drawing = True
        self._up = False
        self._sources: dict[int, weakref.ref[Traced]] = {}
        self._ends: deque[tuple[float, int]] = deque(maxlen=_MOST_STEPS)
        """When the outcomes of each step were known; the writing thread's."""
        names = {TARGET: "target"} | {pid: f"draft {number}" for number, pid in enumerate(self._drafts)}
        file.append(
            _json({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}})
            for pid, name in names.items()
        )
        self._closing = threading.Event()
        # It knows this object weakly: one that is dropped without `close` goes.
        self._thread = threading.Thread(
            target=_keep_writing, args=(weakref.ref(self), self._closing), name="saguaro-trace", daemon=True
        )
        self._thread.start()

    # ---- the target's thread -----------------------------------------------------------------------------------

    def forward_began(self) -> None:
        """A forward of the target begins."""
        self._began = time.perf_counter()

    def forward_ended(self, at: float, rows: Sequence[Verified]) -> None:
        """Its outcomes are known, row by row."""
        began, self._began = self._began, None
        self._step += 1
        if began is not None:
            verifying = sum(row.verified > 0 for row in rows)
            name, many = ("verify", verifying) if verifying else ("forward", len(rows))
            self._add(Event(name, TARGET, began, at - began, {"step": self._step, "rows": many}))

    def enqueued(self, began: float, rows: int, verifying: int) -> None:
        """The host has given a step of so many rows to the device, `verifying` of them with drafts."""
        self._step += 1
        args: dict[str, int | str] = {"step": self._step, "rows": rows, "verifying": verifying}
        self._add(Event("enqueue", TARGET, began, time.perf_counter() - began, args))

    def served(self, at: float, rows: Sequence[Verified]) -> None:
        """The outcomes that were known at this time have been looked up and counted."""
        args: dict[str, int | str] = {"step": self._step, **self._news()}
        args["accepted"] = sum(max(len(row.sampled) - 1, 0) for row in rows)
        args["drafts"] = sum(row.verified for row in rows if row.sampled)
        self._add(Event("outcomes", TARGET, at, None, args))

    def counted(self) -> None:
        """What the device has counted so far is on the page."""
        up = self._page.value(counters.DRAFT_UP) > 0
        if up != self._up:
            self._up = up
            self.draft_up(0, up)
        news = self._news()
        found = {name: news[name] for name in ("hits", "not_predicted", "absent")}
        if any(found.values()):
            self._add(Event("outcomes", TARGET, time.perf_counter(), None, {"step": self._step, **found}))

    def waited(self, began: float, ended: float, rows: int, why: str) -> None:
        """The target's thread waited for drafts of so many rows."""
        self._add(Event("wait", TARGET, began, ended - began, {"step": self._step, "rows": rows, "why": why}))

    def drafted_inline(self, began: float, ended: float) -> None:
        """The target's thread was the draft side."""
        self._add(Event("wait", TARGET, began, ended - began, {"step": self._step, "why": "inline"}))

    def drawing(self, drawing: bool) -> None:
        """Whether the next step has drafts at all."""
        if drawing != self._drawing:
            self._drawing = drawing
            now = time.perf_counter()
            for pid in self._drafts:
                self._add(Event("draws" if drawing else "quiet", pid, now, None, {"step": self._step}))

    def draft_up(self, draft: int, up: bool) -> None:
        """Whether this draft side answers from now on. From any thread."""
        self._add(Event("draft up" if up else "draft down", self._drafts[draft], time.perf_counter(), None, {}))

    def watch(self, draft: int, channel: Traced) -> None:
        """This draft side is asked what it was busy with, as long as the channel is there."""
        self._sources[self._drafts[draft]] = weakref.ref(channel)

    def close(self) -> None:
        """Write what is still to be written."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self.write()
            self._over = True
            with contextlib.suppress(OSError):  # what a full disk says at the end, too, is no affair of the engine's
                self._file.close()

    def _news(self) -> dict[str, int]:
        """What has been counted since the last time."""
        news = {}
        for name, counted in _COUNTED.items():
            now = int(sum(map(self._page.value, counted)))
            news[name], self._seen[name] = now - self._seen[name], now
        return news

    def _add(self, event: Event) -> None:
        if self._over:
            return
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(event)
        else:
            self._lost += 1

    # ---- the writing thread ------------------------------------------------------------------------------------

    def write(self) -> bool:
        """Write what is there; False where that was the end."""
        with self._writing:
            if self._over:
                return False
            try:
                self._write()
            except Exception as error:  # whatever it is, no request must fail for it
                self._over = True
                self._waiting.clear()
                reason = error.strerror if isinstance(error, OSError) else error
                self._log.warning("The trace %s ends here: %s. The engine goes on without it.", self._file.path, reason)
            return not self._over

    def _write(self) -> None:
        """The rounds are fetched before the events, so that the step of each is known by then."""
        rounds = [
            (pid, one)
            for pid, source in list(self._sources.items())
            if (channel := source()) is not None
            for one in channel.rounds()
        ]
        events = []
        while self._waiting:
            events.append(self._waiting.popleft())
        for event in events:
            if event.name in ("verify", "forward", "enqueue") and event.lasted is not None:
                self._ends.append((event.at + event.lasted, int(event.args["step"])))
        events += [event for pid, one in rounds for event in self._of_round(pid, one)]
        if self._lost:
            lost, self._lost = self._lost, 0
            events.append(Event("lost", TARGET, time.perf_counter(), None, {"events": lost}))
        # Of those that begin together the longest first: the others lie in it.
        events.sort(key=lambda event: (event.at, -(event.lasted or 0.0)))
        if events:
            self._file.append(map(_line, events))

    def _of_round(self, pid: int, one: Round) -> Iterator[Event]:
        began, glued, forked, ended = (at / 1e9 for at in (one.began, one.glued, one.forked, one.ended))
        step = self._step_at(began)
        if one.work is Work.PROMPT:
            yield Event("prompt", pid, began, ended - began, {"step": step + 1, "tokens": one.rows})
            return
        args: dict[str, int | str] = {"step": step + 1, "rows": one.rows, "branches": one.branches}
        if one.work is Work.PURSUIT:
            args |= {"step": step, "why": "just in time"}
        yield Event("round", pid, began, ended - began, args)
        for name, start, end in (("glue", began, glued), ("fork", glued, forked), ("decode", forked, ended)):
            if end > start:
                yield Event(name, pid, start, end - start, {})

    def _step_at(self, at: float) -> int:
        """The step whose outcomes were the newest at this time."""
        place = bisect_right(self._ends, at, key=lambda end: end[0])
        return self._ends[place - 1][1] if place else 0


def _keep_writing(trace: weakref.ref[WrittenTrace], closing: threading.Event) -> None:
    while not closing.wait(_EVERY_SECONDS):
        owner = trace()
        if owner is None or not owner.write():
            return
        del owner


def _line(event: Event) -> str:
    """An event as JSON; times in microseconds."""
    place = {"pid": event.of, "tid": 0, "args": event.args}
    what = {"name": event.name, "cat": "target" if event.of == TARGET else "draft"}
    at = round(event.at * 1e6, 3)
    if event.lasted is None:
        return _json({**what, "ph": "i", "s": "t", "ts": at, **place})
    lasted = round(event.lasted * 1e6, 3)
    return _json({**what, "ph": "X", "ts": at, "dur": lasted, **place})


def _json(event: Mapping[str, object]) -> str:
    return json.dumps(event, separators=(",", ":"))
