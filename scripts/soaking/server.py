"""`vllm serve` as a process of its own session, so that all it starts can be found, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp

from scripts.repository import ROOT
from scripts.soaking import processes

START_SECONDS = 300.0
END_SECONDS = 60.0
MARK = "saguaro"
"""What names in shared memory that the plugin makes contain."""
_PR_SET_PDEATHSIG = 1
_LEFTOVER_SECONDS = 10.0
"""So long may what a server started outlive it."""


class ServerError(RuntimeError):
    """A server did not come up, or ended by itself; the message holds the end of its log."""


class Served(Protocol):
    """What is to be served, and how."""

    def command(self, port: int, plain: bool) -> list[str]:
        """The server's command line, with saguaro or plain."""
        ...


class Server(Protocol):
    """What the traffic needs of a server."""

    url: str

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        ...

    def members(self) -> list[int]:
        """Process ids of all that it is made of."""
        ...

    def drafts(self) -> list[int]:
        """Process ids of the draft sides."""
        ...

    def snapshot(self) -> list[processes.Process]:
        """All its processes now."""
        ...


@dataclass(frozen=True)
class End:
    """How a server ended. `left`: processes that outlived it; `shared_memory`: names that it left in /dev/shm.

    `shared_memory_of_others`: names that are new there, too, but nobody has open, and this server was never seen to
    have: with others at work on the machine it cannot be known whose they are. `ray_folders`: those of a Ray of its own
    that its processes were told of, and that are still there.
    """

    status: int | None
    seconds: float
    left: list[str]
    shared_memory: list[str]
    shared_memory_of_others: list[str]
    ray_actors: int
    ray_folders: list[str] = field(default_factory=list)


class VllmServer:
    """One `vllm serve`. Its log goes to `log`, which is appended to."""

    def __init__(self, settings: Served, plain: bool, log: Path) -> None:
        self._shared_memory = processes.shared_memory()
        self.log = log
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        # A draft process does not look into its working directory for modules.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("a", encoding="utf-8") as file:
            self._log_start = file.tell()
            self._process = subprocess.Popen(
                settings.command(port, plain),
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._seen: dict[int, int | None] = {}
        self._held: set[str] = set()
        self._ray_folders: set[str] = set()
        self._killed = False

    @property
    def alive(self) -> bool:
        """Whether the process that answers still runs."""
        return self._process.poll() is None

    async def wait_until_up(self) -> float:
        """Seconds that it took. Raises `ServerError` if it ends first or takes too long."""
        begin = time.monotonic()
        async with aiohttp.ClientSession() as session:
            while self.alive and time.monotonic() - begin < START_SECONDS:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return time.monotonic() - begin
                await asyncio.sleep(0.25)
        raise ServerError(f"the server did not come up\n--- end of its log\n{self.end_of_log()}")

    def members(self) -> list[int]:
        """Its processes now: those of its session, and what they started. They are remembered, with when they began:
        one that has left the session, and whose parent has ended, is still known, and never taken for another."""
        found = processes.with_descendants(self._ours_alive())
        for pid in found:
            self._seen.setdefault(pid, processes.start_time(pid))
        return found

    def _ours_alive(self) -> list[int]:
        known = {pid for pid, begin in self._seen.items() if begin is not None and processes.start_time(pid) == begin}
        return sorted({*processes.session_members(self._process.pid), *filter(processes.is_alive, known)})

    def drafts(self) -> list[int]:
        """The draft sides among them."""
        return [pid for pid in self.members() if processes.is_draft(processes.command_line(pid))]

    def snapshot(self) -> list[processes.Process]:
        """What each of them holds now."""
        self._remember()
        return [found for pid in self.members() if (found := processes.look_at(pid)) is not None]

    def end(self) -> End:
        """Ask it to end (SIGTERM), wait, and look for what is left; that is then ended by force."""
        self._remember()
        begin = time.monotonic()
        status: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(END_SECONDS)
        seconds = time.monotonic() - begin
        left, names, folders = self._leftovers()
        while (left or self._ours(names) or folders) and time.monotonic() - begin < seconds + _LEFTOVER_SECONDS:
            time.sleep(0.1)
            left, names, folders = self._leftovers()
        described = [f"{pid} {processes.command_line(pid)[:120]}" for pid in left]
        actors = sum(processes.is_ray_actor(processes.command_line(pid)) for pid in left)
        self.kill()
        ours = self._ours(names)
        return End(status, seconds, described, sorted(ours), sorted(names - ours), actors, folders)

    def kill(self) -> None:
        """End all that is still there by force, once. Its shared memory is not touched."""
        if self._killed:  # the ids may be those of others by now
            return
        self._killed = True
        for pid in self._leftovers()[0]:
            if pid != self._process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def end_of_log(self, lines: int = 25) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_text(self) -> str:
        """What this server wrote."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def _ours(self, names: set[str]) -> set[str]:
        """Those that a process of ours has held, or that are called after us."""
        return {name for name in names if name in self._held or MARK in name}

    def _remember(self) -> None:
        """What its processes have now, and may leave."""
        for pid in self.members():
            self._held |= processes.names_held_by(pid)
            self._ray_folders |= processes.ray_folders_in(processes.command_line(pid))

    def _leftovers(self) -> tuple[list[int], set[str], list[str]]:
        """Processes, shared memory and folders of ours that are there now, beside the server itself."""
        left = [pid for pid in self.members() if pid != self._process.pid or self.alive]
        names = processes.without_owner(processes.shared_memory() - self._shared_memory)
        return left, names, sorted(filter(os.path.lexists, self._ray_folders))


def end_with_parent() -> None:
    """In the server, before it begins: SIGTERM when the soak ends, even by SIGKILL (Linux only, as is all here)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
