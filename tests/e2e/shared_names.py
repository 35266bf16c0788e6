"""What the processes of one test leave in /dev/shm, told from what others on this machine do there meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from scripts.soaking import processes

LOOK_SECONDS = 0.5


def held_names() -> set[str]:
    """The names that this process and those below it have open or mapped now."""
    return set().union(*map(processes.names_held_by, processes.with_descendants([os.getpid()])))


class Names:
    """The names that this process and those below it have had open or mapped while they were looked at."""

    def __init__(self) -> None:
        self._before = processes.shared_memory()
        self._held: set[str] = set()

    def look(self) -> None:
        """Add what is held now."""
        self._held |= held_names()

    def left(self) -> set[str]:
        """Those of them that were not there before, are there still, and have no owner any more."""
        return processes.without_owner(self._held - self._before)


@contextlib.contextmanager
def names_in_shared_memory() -> Iterator[Names]:
    """Look from time to time while this lasts; the last time as soon as it ends."""
    names, ended = Names(), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            names.look()

    looking = threading.Thread(target=look, name="names-in-shared-memory", daemon=True)
    looking.start()
    try:
        yield names
        names.look()
    finally:
        ended.set()
        looking.join()
