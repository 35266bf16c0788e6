"""What a test sees of processes from outside, and how long it waits for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_saguaro.placement.channel import Channel, DraftFailed


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def waits_apart(channel: Channel) -> tuple[threading.Thread, list[str]]:
    """A thread that waits until the channel is ready; and, once that has ended, what it failed with."""
    failures: list[str] = []

    def wait() -> None:
        try:
            channel.wait_until_ready()
        except DraftFailed as failure:
            failures.append(str(failure))

    waiting = threading.Thread(target=wait)
    waiting.start()
    return waiting, failures


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return _status(pid)[0] == "Z"
    except OSError:
        return True


def becomes_idle(pid: int) -> bool:
    """Whether a process comes to use hardly any time."""
    return until(lambda: _used_in_a_second(pid) < 0.05)


def _used_in_a_second(pid: int) -> float:
    before = _cpu_seconds(pid)
    time.sleep(1.0)
    return _cpu_seconds(pid) - before


def _cpu_seconds(pid: int) -> float:
    return sum(map(int, _status(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
