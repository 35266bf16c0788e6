from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting import standing
from scripts.faulting.standing import HOST, READER, Spent, Watch, most_waited, to_json

TICKS = os.sysconf("SC_CLK_TCK")


class Proc:
    """A made-up /proc, in which the test lets time pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def say(self, pid: int, ran: float, waited: float) -> None:
        file = self.folder / str(pid) / "task" / str(pid) / "schedstat"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{ran * 1e9:.0f} {waited * 1e9:.0f} 7\n")

    def steal(self, seconds: float) -> None:
        (self.folder / "stat").write_text(f"cpu  1 2 3 4 5 6 7 {seconds * TICKS:.0f} 9 10\ncpu0 1 2\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    monkeypatch.setattr(standing, "_PROC", tmp_path)
    monkeypatch.setattr(standing, "LOOK_SECONDS", 0.005)
    made = Proc(tmp_path)
    made.say(os.getpid(), 1.0, 0.0)
    made.steal(5.0)
    return made


def look(watch: Watch) -> float:
    """A moment at which all that was said before has been seen, and nothing that is said after it."""
    count = len(watch._looks)
    while len(watch._looks) < count + 2:
        time.sleep(0.001)
    return time.monotonic()


def test_what_was_run_and_waited_between_two_moments_is_told_by_name(proc: Proc) -> None:
    proc.say(7, 3.0, 1.0)
    with Watch({"Worker": 7}) as watch:
        begin = look(watch)
        proc.say(7, 3.25, 2.5)
        proc.say(os.getpid(), 1.125, 0.0)
        proc.steal(5.5)
        end = look(watch)
        look(watch)
        found = watch.spent(begin, end)
    assert found == {"Worker": Spent(0.25, 1.5), READER: Spent(0.125, 0.0), HOST: Spent(0.0, 0.5)}
    assert most_waited(found) == ("Worker", 1.5)
    assert to_json(found)["Worker"] == {"ran": 0.25, "waited": 1.5}


def test_a_process_that_ends_is_left_out_and_the_others_are_told(proc: Proc) -> None:
    proc.say(7, 3.0, 1.0)
    with Watch({"server": 7}) as watch:
        begin = look(watch)
        (proc.folder / "7" / "task" / "7" / "schedstat").unlink()
        end = look(watch)
        look(watch)
        assert watch.spent(begin, end).keys() == {READER, HOST}


def test_a_time_that_was_not_watched_has_nothing_to_tell(proc: Proc) -> None:
    before = time.monotonic()
    with Watch({}) as watch:
        begin = look(watch)
    assert watch.spent(before - 1, begin) == {}
    assert watch.spent(begin, time.monotonic() + 1) == {}
    assert most_waited({}) is None


def test_a_thread_that_computes_has_run() -> None:
    with Watch({}) as watch:
        begin = look(watch)
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        end = look(watch)
        look(watch)
        found = watch.spent(begin, end)
    assert found[READER].ran > 0.05
