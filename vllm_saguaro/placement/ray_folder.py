"""The folder of a Ray of our own: made, and removed with all that still runs in it.

What Ray has started ends with it or its driver, but some of it only when it notices: the agents of a raylet that was
killed go on for up to a minute, and what goes on makes the folder anew. So that is ended first.

A folder is its owner's as long as that holds its lock, which the system takes back in whatever way the owner ends. One
that nobody holds is removed at the next start of a Ray of our own: vLLM ends an engine by killing all that descends
from it at once, and then there is nobody left to do it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PREFIX = "saguaro-ray-"
_LOCK = "owner"
"""Folders without this file are none that we have made, or not yet."""
_BOUND_SECONDS = 2.0
"""A killed process is gone in a moment, unless a device or a disk holds it."""
_LOOK_SECONDS = 0.02


def make_folder() -> tuple[str, int]:
    """A new folder, with a short path because sockets lie in it, and the descriptor whose lock says that it is ours."""
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        lock = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody who looks for folders without an owner was here first, and removes it
        except OSError:
            return folder, lock  # a file system without locks: nobody else can have it either
        else:
            if os.fstat(lock).st_nlink:
                return folder, lock
        os.close(lock)


def clear_folder(folder: str) -> None:
    """End all that runs in it, and remove it; whatever withstands that for long is left."""
    _again_until(lambda: not _kill_all(processes_in(folder)))
    _again_until(lambda: _is_removed(folder))


def clear_abandoned_folders() -> None:
    """Clear the folders of this user whose owner is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it has an owner, or no lock, or goes at this moment
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear_folder(str(folder))
            finally:
                os.close(lock)


def processes_in(folder: str) -> list[int]:
    """Processes of this user, but for this one, that were told of the folder as Ray's are, or write into its session.

    Workers and agents of Ray overwrite their command line; their logs are open. Who merely reads a log is left alone,
    whether or not its path is in the command line.
    """
    found, real = [], os.path.realpath(folder)  # as it was told to Ray, and as the system knows it
    told = _as_told(folder, real)
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended
                if process.stat().st_uid == os.getuid() and (_was_told(process, told) or _writes(process, real)):
                    found.append(int(process.name))
    return found


def _as_told(*paths: str) -> re.Pattern[bytes]:
    """The options of all of Ray's processes that name the folder: `--temp-dir=`, `--session_dir=`, `--log_dir=` .."""
    path = b"|".join(re.escape(os.fsencode(path)) for path in paths)
    return re.compile(rb"(?:^|[\0 ])--[a-z_-]+[_-]dir=(?:" + path + rb")(?:[/\0 ]|$)")


def _was_told(process: Path, told: re.Pattern[bytes]) -> bool:
    return told.search((process / "cmdline").read_bytes()) is not None


def _writes(process: Path, folder: str) -> bool:
    session = os.path.join(folder, "session_")  # not the lock, which children that its owner has forked may have
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(descriptor).startswith(session) and descriptor.lstat().st_mode & stat.S_IWUSR:
                return True
    return False


def _kill_all(processes: list[int]) -> list[int]:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return processes


def _is_removed(folder: str) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def _again_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _BOUND_SECONDS
    while not done() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
