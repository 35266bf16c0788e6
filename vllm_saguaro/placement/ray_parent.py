"""What the process that speaks to Ray knows of the one that started it."""

from __future__ import annotations

import json
import os
import queue
import select
import threading
import time
from typing import IO, Any

import ray
from ray.exceptions import GetTimeoutError

LOOK_SECONDS = 0.5
_PARENT_CHECK_MILLISECONDS = 1000


class Ended(Exception):
    """The target side has ended; there is nothing more to do."""


class Parent:
    """The target side's process: what it says, and when it ends."""

    def __init__(self, stdin: IO[bytes]) -> None:
        self._pid = os.getppid()
        self._fd = stdin.fileno()
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.ended = threading.Event()
        threading.Thread(target=self._read, name="saguaro-parent-watch", daemon=True).start()

    def message(self) -> dict[str, Any]:
        """The next line of JSON. Raises `Ended`."""
        while True:
            try:
                return json.loads(self._lines.get(timeout=LOOK_SECONDS))
            except queue.Empty:
                self.check()

    def check(self) -> None:
        """Raises `Ended` when it has."""
        if self.ended.is_set():
            raise Ended

    def _read(self) -> None:
        held, poll = b"", select.poll()
        poll.register(self._fd, select.POLLIN)
        while os.getppid() == self._pid:  # a fork of the parent may still hold the pipe's other end
            if not poll.poll(_PARENT_CHECK_MILLISECONDS):
                continue
            piece = os.read(self._fd, 1 << 16)
            if not piece:
                break
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                self._lines.put(line)
        self.ended.set()


def result(reference: Any, parent: Parent, seconds: float | None = None) -> Any:
    """What a call gives, unless the target side ends before. Raises `Ended`; `TimeoutError` after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            return ray.get(reference, timeout=LOOK_SECONDS)
        except GetTimeoutError:
            parent.check()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError from None
