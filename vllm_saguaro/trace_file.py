"""The file of a trace: Chrome's "JSON array" format, as chrome://tracing and Perfetto read it, at any moment.

The first line is `[`, then comes one event a line, each ended by a comma; the bracket at the end is left out, as the
format allows. So the file can be read while it is written, and what an engine leaves that was killed is whole.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterable

from vllm_saguaro.config import SaguaroConfigError

MOST_BYTES = 1 << 30
"""An engine runs for weeks, and viewers take no more than about this much."""
_BEGINNING = b"[\n"
_END_BYTES = 16
"""Enough to see the last bracket of a list, whatever blanks come after it."""


class TraceFile:
    """Lines that are appended, all of a call or none."""

    def __init__(self, path: str, most_bytes: int = MOST_BYTES) -> None:
        """Replaces what is at `path`. Raises `OSError` where it cannot be written."""
        self.path, self._most = path, most_bytes
        self._file = io.FileIO(path, "w")  # unbuffered: what is written is there for others to read
        self._size = 0
        try:
            self._write(_BEGINNING)
        except OSError:
            self._file.close()
            raise

    def append(self, events: Iterable[str]) -> None:
        """Write events, each as JSON without line breaks. Raises `OSError` where there is no room for all of them."""
        self._write("".join(f"{event},\n" for event in events).encode())

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        if self._size + len(data) > self._most:
            raise OSError(errno.EFBIG, f"it may have {self._most} bytes at most")
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):  # a device has no end that could be moved
                os.ftruncate(self._file.fileno(), self._size)  # half an event is none
            raise
        self._size += written


def checked_path(path: str) -> str:
    """Look whether a trace can be written to `path`: its absolute path. One that is there is left as it is.

    Raises `SaguaroConfigError` where there is no such folder, where something is there that is no trace, and where the
    system does not let us write or has no room.
    """
    path = os.path.abspath(os.path.expanduser(path))
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise SaguaroConfigError(f"trace: there is no folder {folder}: make it, or name a file in one that is there")
    try:
        if os.path.lexists(path) and not _is_trace(path):
            raise SaguaroConfigError(f"trace: {path} is there and is no trace: name another file, or remove it")
        with open(path, "ab") as file:
            if not file.tell():
                file.write(_BEGINNING)
    except OSError as error:
        raise SaguaroConfigError(
            f"trace: {path} cannot be written ({error.strerror}): name a file where you may write and there is room"
        ) from None
    return path


def _is_trace(path: str) -> bool:
    """Whether a file is there that is empty, or begins as ours do and is as open at its end: nothing else is replaced.

    A list in JSON may begin like a trace; its bracket at the end is what a trace leaves out.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
    except FileNotFoundError:  # a link to nowhere
        return True
    with open(path, "rb") as file:
        beginning = file.read(len(_BEGINNING))
        file.seek(max(os.fstat(file.fileno()).st_size - _END_BYTES, 0))
        closed = file.read().rstrip().endswith(b"]")
    return beginning in (b"", _BEGINNING) and not closed
