"""Memory that two processes share and nobody else finds: a memfd."""

from __future__ import annotations

import fcntl
import os


def sealed_memfd(name: str, size: int) -> int:
    """A descriptor of `size` bytes of shared memory, all zero. `name` is what /proc shows, and need not be unique.

    It has no name in any file system, so whoever wants it needs the descriptor, or the rights of the same user over a
    process that has it (/proc/PID/fd). A memfd is open to all by its mode (0777) unless one says otherwise. Its size is
    sealed: memory that another process makes smaller ends everyone who touches it (SIGBUS).
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def keeps_its_size(fd: int) -> bool:
    """Whether nobody can make this memory smaller."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file of a kind that has no seals
        return False
    return bool(seals & fcntl.F_SEAL_SHRINK)
