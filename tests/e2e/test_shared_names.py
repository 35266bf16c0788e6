from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory

import pytest

from tests.e2e.shared_names import LOOK_SECONDS, held_names, names_in_shared_memory

LEAVES = """
import os, sys
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister("/" + memory.name, "shared_memory")
print(memory.name, flush=True)
sys.stdin.read()
if "tidy" in sys.argv:
    os.unlink("/dev/shm/" + memory.name)
os._exit(0)
"""


@pytest.fixture
def names() -> Iterator[list[str]]:
    """What is to be removed in the end."""
    made: list[str] = []
    yield made
    for name in made:
        try:
            memory = shared_memory.SharedMemory(name)
        except FileNotFoundError:
            continue
        memory.close()
        memory.unlink()


def child(names: list[str], *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    names.append(process.stdout.readline().strip())
    return process


def test_what_a_process_below_leaves_is_found(names: list[str]) -> None:
    with names_in_shared_memory() as found:
        process = child(names)
        time.sleep(3 * LOOK_SECONDS)
        assert set(names) <= held_names()
        assert found.left() == set(), "it is still in use"
        process.communicate()
        time.sleep(3 * LOOK_SECONDS)
    assert found.left() == set(names)


def test_what_it_removes_is_not_left(names: list[str]) -> None:
    with names_in_shared_memory() as found:
        process = child(names, "tidy")
        time.sleep(3 * LOOK_SECONDS)
        process.communicate()
    assert found.left() == set()


def test_what_was_there_before_and_what_nobody_below_has_held_is_not_ours(names: list[str]) -> None:
    with names_in_shared_memory() as found:
        before = child(names)
        before.communicate()
    with names_in_shared_memory() as found:
        memory = shared_memory.SharedMemory(create=True, size=4096)
        names.append(memory.name)
        resource_tracker.unregister("/" + memory.name, "shared_memory")
        memory.close()  # at once: to those who look it is a stranger's
        time.sleep(3 * LOOK_SECONDS)
    assert found.left() == set()
