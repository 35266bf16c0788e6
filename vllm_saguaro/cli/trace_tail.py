"""The end of a trace that a server is writing: its newest events, whatever happens to the file meanwhile."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

_MOST_EVENTS: Final = 16384
_MOST_BYTES: Final = 4 << 20
"""Read at once at most: of a longer piece only its end."""
_KNOWN_BYTES: Final = 64
_MOST_MICROSECONDS: Final = 1e18
"""Some 30000 years: what lies further is no time, and their differences would not be finite."""


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One event of Chrome's trace format. `start` and `length` in microseconds; `length` is None for an instant."""

    name: str
    category: str
    process: int
    start: float
    length: float | None
    arguments: dict[str, Any]

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + (self.length or 0.0)


@dataclass(frozen=True, slots=True)
class Tail:
    """The newest events in order of their start, names of processes, when the file was written, what is wrong."""

    events: list[TraceEvent]
    processes: dict[int, str]
    written: float | None
    problem: str | None


class TraceFile:
    """Reads what has been added to a file of one event a line. Any thread may ask.

    The file may not be there yet, be cut to nothing and begun anew, be another one under the same name, or end in half
    a line. What was read of a file that has been replaced is forgotten.
    """

    def __init__(self, path: Path, events: int = _MOST_EVENTS) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._events: deque[TraceEvent] = deque(maxlen=events)
        self._processes: dict[int, str] = {}
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._known = b""
        self._whole = True

    def read(self) -> Tail:
        """All events in hand, after reading what is new. It never waits for a writer and raises nothing."""
        with self._lock:
            written, problem = None, None
            try:
                written = self._read_new()
            except FileNotFoundError:
                problem = (
                    f"{self.path} is not there yet: the server writes it if its speculative config has it as trace"
                )
            except OSError as error:
                problem = f"{self.path} cannot be read ({error.strerror or error})"
            events = sorted(self._events, key=lambda event: event.start)
            return Tail(events, dict(self._processes), written, problem)

    def _read_new(self) -> float:
        # Opened anew each time: the name may lead to another file. A pipe would be waited for without O_NONBLOCK.
        with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no regular file")
            identity = status.st_dev, status.st_ino
            if identity != self._file or status.st_size < self._offset or not self._goes_on(file):
                self._forget()
                self._file = identity
            if status.st_size - self._offset > _MOST_BYTES:
                self._offset = status.st_size - _MOST_BYTES
                self._whole = False
            file.seek(self._offset)
            data = file.read(status.st_size - self._offset)
        complete = data[: data.rfind(b"\n") + 1]
        if complete:
            self._offset += len(complete)
            self._known = complete[-_KNOWN_BYTES:]
            lines = complete.split(b"\n")
            for line in lines if self._whole else lines[1:]:
                self._take(line)
            self._whole = True
        return status.st_mtime

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read last is still there: not so if the file was cut and has grown past it since."""
        file.seek(self._offset - len(self._known))
        return file.read(len(self._known)) == self._known

    def _forget(self) -> None:
        self._events.clear()
        self._processes.clear()
        self._offset, self._known, self._whole = 0, b"", True

    def _take(self, line: bytes) -> None:
        event = parse(line)
        if isinstance(event, TraceEvent):
            self._events.append(event)
        elif event is not None:
            self._processes.update(event)


def parse(line: bytes) -> TraceEvent | dict[int, str] | None:
    """An event, or a name for a process, out of one line; None where there is neither."""
    text = line.strip().rstrip(b",").lstrip(b"[")
    try:
        found = json.loads(text)
        process, arguments = int(found["pid"]), dict(found.get("args") or {})
        if found["ph"] == "M":
            return {process: str(arguments["name"])} if found["name"] == "process_name" else None
        if found["ph"] not in ("X", "i"):
            return None
        start, length = float(found["ts"]), float(found["dur"]) if found["ph"] == "X" else None
        if not abs(start) + abs(length or 0.0) < _MOST_MICROSECONDS:  # NaN is not less either
            return None
        return TraceEvent(str(found["name"]), str(found.get("cat", "")), process, start, length, arguments)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
