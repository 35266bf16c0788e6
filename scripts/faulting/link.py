"""The TCP stream between an engine and a draft on another node, found from outside, and made to fall silent.

A descriptor of another process can be copied (`pidfd_getfd`), and a socket filter that keeps nothing makes the kernel
drop all that arrives there, acknowledgements included: what a cable that is pulled out looks like to both ends. It
takes the rights of a debugger: the same user, or root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PIDFD_GETFD = 438
"""The system call's number, the same on all processors."""
_SO_ATTACH_FILTER = 26
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""One instruction of a classic BPF program: keep no byte of the packet."""
_ESTABLISHED = "01"


@dataclass(frozen=True)
class End:
    """One end of a stream: a descriptor of a process, and both addresses as the kernel writes them."""

    pid: int
    descriptor: int
    local: str
    remote: str


def streams_of(pid: int) -> list[End]:
    """The TCP streams that a process has open now; none for one that is gone or not ours to look at."""
    inodes = {}
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                name = os.readlink(entry)
                if name.startswith("socket:["):
                    inodes[name[len("socket:[") : -1]] = int(entry.name)
        tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return []
    return [
        End(pid, inodes[fields[9]], fields[1], fields[2])
        for fields in lines
        if fields[3] == _ESTABLISHED and fields[9] in inodes
    ]


def between(draft: int, others: Iterable[int]) -> tuple[End, End] | None:
    """Both ends of a stream between the draft and one of the others; None if there is none."""
    ours = {(end.local, end.remote): end for pid in others for end in streams_of(pid)}
    for end in streams_of(draft):
        other = ours.get((end.remote, end.local))
        if other is not None:
            return end, other
    return None


def silence(end: End) -> None:
    """Nothing arrives there any more. Raises `OSError` where the system does not let us."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(end.pid)
    try:
        copy = libc.syscall(_PIDFD_GETFD, process, end.descriptor, 0)
        if copy < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(process)
    program = ctypes.create_string_buffer(_RETURN_NOTHING)
    with socket.socket(fileno=copy) as stream:
        stream.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HL", 1, ctypes.addressof(program)))
