"""Processes as Linux shows them: which ones a server has, what each of them holds, and what is left in the end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_saguaro.placement.ray_folder import PREFIX

_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")

DRAFT = "vllm_saguaro.vllm_hooks.draft_process"
"""What the command line of a draft process names."""
_OF_RAY_ITSELF = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Workers without work, and the two agents of a node."""
_RAY_FOLDER = re.compile(rf"[^\s\0=:,\"']*/{PREFIX}[^/\s\0:,\"']+")
"""The folder of a Ray of an engine's own, as its processes are told of it."""
_PLACER = "vllm_saguaro.placement.ray_placer"
"""What that of the process names that speaks to Ray."""


@dataclass(frozen=True)
class Process:
    """One process at one moment. `memory`: bytes that are its own, shared pages by their share (PSS)."""

    pid: int
    name: str
    memory: int
    descriptors: int
    threads: int


def session_members(session: int) -> list[int]:
    """Living processes of one session (`setsid`), orphans among them; zombies do not live."""
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            state = _state(int(entry.name))
            if state is not None and state[0] not in "ZX" and int(state[3]) == session:
                found.append(int(entry.name))
    return sorted(found)


def with_descendants(pids: Iterable[int]) -> list[int]:
    """These processes and all that they have started and that still runs, whatever session it has gone to."""
    found = dict.fromkeys(pids)
    queue = list(found)
    for pid in queue:
        children: list[int] = []
        for task in (_PROC / str(pid) / "task").glob("*/children"):
            with contextlib.suppress(OSError):
                children += map(int, task.read_text().split())
        queue += [child for child in children if child not in found]
        found |= dict.fromkeys(children)
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether it still runs; a zombie does not."""
    state = _state(pid)
    return state is not None and state[0] not in "ZX"


def start_time(pid: int) -> int | None:
    """When it began, in ticks since boot: with the pid this is a name that is never used again. None: it is gone."""
    state = _state(pid)
    return None if state is None else int(state[19])


def _state(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on; None if there is no such process."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def command_line(pid: int) -> str:
    """Its command line, in one string; empty for one that is gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def name_of(pid: int) -> str:
    """What a process of the server is: "draft", "EngineCore", "Worker", "resource_tracker", "ray" or "server"."""
    line = command_line(pid)
    if is_draft(line):
        return "draft"
    if line.startswith("VLLM::"):
        return line.removeprefix("VLLM::").split()[0]
    if "resource_tracker" in line:
        return "resource_tracker"
    return "ray" if line.startswith("ray::") or "/ray/" in line or _PLACER in line else "server"


def is_draft(line: str) -> bool:
    """Whether this is the command line of a draft side: a child of the engine's, or a Ray actor of ours."""
    return DRAFT in line or (line.startswith("ray::") and "draft" in line.lower())


def is_ray_actor(line: str) -> bool:
    """Whether this is the command line of a Ray actor (Ray names them so); an idle worker is none, nor an agent."""
    return line.startswith("ray::") and not line.startswith(_OF_RAY_ITSELF)


def ray_folders_in(line: str) -> set[str]:
    """The folders of Rays of an engine's own that this command line names."""
    return set(_RAY_FOLDER.findall(line))


def look_at(pid: int) -> Process | None:
    """What a process holds now; None if it is gone."""
    folder = _PROC / str(pid)
    try:
        rollup = (folder / "smaps_rollup").read_text()
        memory = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        descriptors = len(os.listdir(folder / "fd"))
        threads = len(os.listdir(folder / "task"))
    except (OSError, StopIteration):
        return None
    return Process(pid, name_of(pid), memory << 10, descriptors, threads)


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir(_SHARED_MEMORY))


def without_owner(names: set[str]) -> set[str]:
    """Those of the names in /dev/shm that no living process has open or mapped: what others use is theirs."""
    left = {name for name in names if (_SHARED_MEMORY / name).exists()}
    for entry in _PROC.iterdir() if left else ():
        if entry.name.isdigit():
            left -= names_held_by(int(entry.name))
    return left


def names_held_by(pid: int) -> set[str]:
    """Names in /dev/shm that a process has open or mapped."""
    folder = _PROC / str(pid)
    prefix = f"{_SHARED_MEMORY}/"
    try:
        held = {line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines() if prefix in line}
        links = list((folder / "fd").iterdir())
    except OSError:  # it has ended, or is not ours to look at
        return set()
    for link in links:
        with contextlib.suppress(OSError):  # closed in the meantime
            held.add(os.readlink(link))
    return {path.removeprefix(prefix) for path in held if path.startswith(prefix)}
