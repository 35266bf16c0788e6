from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting import memory
from scripts.soaking.processes import is_alive

EATS = "import time\nheld = []\nwhile True:\n held.append(bytearray(b'x' * (1 << 20)))\n time.sleep(0.02)"
RESTS = "import time\ntime.sleep(60)"


@pytest.fixture
def hungry() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", EATS], stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    yield process
    process.kill()
    process.wait()


def group(name: str) -> memory.FullGroup:
    try:
        return memory.FullGroup(name)
    except OSError:
        pytest.skip("no memory cgroup can be made here")


def starved(pid: int) -> str:
    return asyncio.run(memory.starve(pid, random.Random(0)))


def test_the_kernel_ends_a_process_whose_group_is_full(hungry: subprocess.Popen[bytes]) -> None:
    asyncio.run(group("saguaro-fault-test").end())
    assert "memory cgroup full, killed by the kernel" in starved(hungry.pid)
    assert hungry.wait(60) == -9


def test_a_group_is_removed_whoever_is_in_it() -> None:
    rests = subprocess.Popen([sys.executable, "-c", RESTS])
    try:
        time.sleep(0.3)
        made = group("saguaro-fault-test")
        made.take(rests.pid)
        asyncio.run(made.end())
        assert not any(version.folder.joinpath("saguaro-fault-test").exists() for version in memory._VERSIONS)
        assert is_alive(rests.pid)
    finally:
        rests.kill()
        rests.wait()


def test_where_no_group_can_be_made_its_own_limits_are_used(
    hungry: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = memory._Version(tmp_path / "nowhere", "limit", (), "events")
    monkeypatch.setattr(memory, "_VERSIONS", (nowhere,))
    with pytest.raises(OSError, match="no memory cgroup"):
        memory.FullGroup("any")
    assert "no more memory, it ended after" in starved(hungry.pid)
    assert hungry.wait(60) == 1  # MemoryError


def test_a_process_that_needs_no_more_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(group("saguaro-fault-test").end())
    monkeypatch.setattr(memory, "SECONDS", 0.2)
    rests = subprocess.Popen([sys.executable, "-c", RESTS])
    try:
        time.sleep(0.3)
        assert "it went on" in starved(rests.pid)
        assert is_alive(rests.pid)
    finally:
        rests.kill()
        rests.wait()
