"""No more memory for one process: by the kernel's own hand where a memory cgroup can be made."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.soaking.faults import exhaust
from scripts.soaking.processes import is_alive

LIMIT_BYTES = 1 << 20
"""For what is touched from now on; what a process has already stays on the account of its former cgroup."""
SECONDS = 20.0
_ROOT = Path("/sys/fs/cgroup")
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class _Version:
    """How one version of cgroups calls things."""

    folder: Path
    limit: str
    others: tuple[tuple[str, str], ...]
    """What else is written where the system knows it: nothing may be swapped out instead."""
    events: str


_VERSIONS = (
    _Version(_ROOT / "memory", "memory.limit_in_bytes", (("memory.swappiness", "0"),), "memory.oom_control"),
    _Version(_ROOT, "memory.max", (("memory.swap.max", "0"),), "memory.events"),
)


class FullGroup:
    """A memory cgroup that is as good as full. Raises `OSError` where none can be made: without rights, without a
    memory controller.
    """

    def __init__(self, name: str) -> None:
        for version in _VERSIONS:
            self._folder, self._version = version.folder / name, version
            try:
                self._folder.mkdir()
            except OSError:
                continue
            try:
                (self._folder / version.limit).write_text(str(LIMIT_BYTES))
            except OSError:
                self._folder.rmdir()
                continue
            for file, value in version.others:
                with contextlib.suppress(OSError):
                    (self._folder / file).write_text(value)
            return
        raise OSError("no memory cgroup can be made here")

    def take(self, pid: int) -> None:
        """From now on the process pays here. Raises `OSError`."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        """How many processes the kernel has ended for it; 0 where it does not tell."""
        with contextlib.suppress(OSError, ValueError):
            for line in (self._folder / self._version.events).read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        return 0

    async def end(self) -> None:
        """Let go whoever is still in it, and remove it."""
        with contextlib.suppress(OSError):
            for pid in (self._folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (self._version.folder / "cgroup.procs").write_text(pid)
        for _ in range(40):
            try:
                self._folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # a process that was ended leaves a moment later
                await asyncio.sleep(_LOOK_SECONDS)


async def starve(pid: int, r: random.Random) -> str:
    """Do it, wait until the process has ended (or has done without for a while), and say how it was done."""
    try:
        group = FullGroup(f"saguaro-fault-{pid}")
    except OSError:
        return await exhaust(pid, r)
    try:
        try:
            group.take(pid)
        except OSError:
            return await exhaust(pid, r)
        begin = time.monotonic()
        while is_alive(pid) and time.monotonic() - begin < SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
        took = time.monotonic() - begin
        if is_alive(pid):
            return f"no more memory for {took:.1f} s, it went on"
        return f"memory cgroup full, {'killed by the kernel' if group.kills else 'ended'} after {took:.1f} s"
    finally:
        await group.end()
