from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking import faults
from scripts.soaking.faults import ACTIONS, plan
from scripts.soaking.processes import is_alive
from scripts.soaking.settings import Settings

COUNTS = "import time\nwhile True:\n print('x', flush=True)\n time.sleep(0.01)"
EATS = "import time\nheld = []\nwhile True:\n held.append(bytearray(8 << 20))\n time.sleep(0.02)"


def child(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.fixture
def counting() -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes a hundred characters a second."""
    process = child(COUNTS)
    assert process.stdout is not None
    process.stdout.read(1)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def goes_on(process: subprocess.Popen[bytes]) -> bool:
    """Whether it still writes (what it wrote before is read away first)."""
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1 << 16)
    process.stdout.read(20)
    return is_alive(process.pid)


def do(kind: str, pid: int) -> str:
    async def run() -> str:
        return await ACTIONS[kind](pid, random.Random(0))

    return asyncio.run(run())


def test_the_plan_is_a_function_of_the_settings() -> None:
    settings = Settings(requests=2000, faults={"kill": 30, "stop": 5, "slow": 3}, seed=9)
    assert plan(settings) == plan(settings)
    assert plan(settings) != plan(Settings(requests=2000, faults={"kill": 30, "stop": 5, "slow": 3}, seed=8))


def test_the_plan_has_every_fault_once_in_order_and_after_the_warm_up() -> None:
    settings = Settings(requests=500, faults={"kill": 30, "stop": 5, "oom": 0, "slow": 3}, warm_up=50)
    found = plan(settings)
    kinds = [fault.kind for fault in found]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"kill": 30, "stop": 5, "slow": 3}
    positions = [fault.position for fault in found]
    assert positions == sorted(positions)
    assert positions[0] >= 50
    assert positions[-1] < 500
    assert [fault.number for fault in found] == list(range(38))


def test_a_killed_process_is_gone(counting: subprocess.Popen[bytes]) -> None:
    assert do("kill", counting.pid) == "SIGKILL"
    assert not is_alive(counting.pid)


def test_a_stopped_process_goes_on_after_a_while(
    counting: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "STOP_SECONDS", 0.3)
    assert "SIGCONT after 0." in do("stop", counting.pid)
    assert goes_on(counting)


def test_a_stopped_process_that_somebody_ends_is_told(counting: subprocess.Popen[bytes]) -> None:
    async def run() -> str:
        doing = asyncio.create_task(faults.stop(counting.pid, random.Random(0)))
        await asyncio.sleep(0.2)
        counting.kill()
        return await doing

    begin = time.monotonic()
    assert "ended after" in asyncio.run(run())
    assert time.monotonic() - begin < faults.STOP_SECONDS


def test_a_stop_that_is_cut_short_lets_the_process_go_on(counting: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        doing = asyncio.create_task(faults.stop(counting.pid, random.Random(0)))
        await asyncio.sleep(0.2)
        doing.cancel()
        await asyncio.wait({doing})

    asyncio.run(run())
    assert goes_on(counting)


def test_a_process_that_needs_more_memory_ends_without() -> None:
    process = child(EATS)
    try:
        time.sleep(0.3)
        assert "no more memory, it ended" in do("oom", process.pid)
        assert process.wait(60) == 1  # MemoryError
    finally:
        process.kill()
        process.wait()


def test_a_process_that_needs_no_more_gets_its_limits_back(
    counting: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(faults, "MEMORY_SECONDS", 0.2)
    before = resource.prlimit(counting.pid, resource.RLIMIT_AS)
    assert "it went on" in do("oom", counting.pid)
    assert resource.prlimit(counting.pid, resource.RLIMIT_AS) == before
    assert goes_on(counting)


def test_a_slowed_process_goes_on(counting: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "SLOW_SECONDS", 0.3)
    monkeypatch.setattr(faults, "SLOW_TURN_SECONDS", (0.01, 0.05))
    assert do("slow", counting.pid).startswith("stopped ")
    assert goes_on(counting)


def test_a_process_that_is_gone_already_does_no_harm() -> None:
    process = child("pass")
    process.wait()
    for kind in ("kill", "oom", "slow", "stop"):
        assert do(kind, process.pid)
