"""The cost of a hit: marks around the part of a round that the target waits for, on a device that follows a script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.gpu_checking.hit_cost import CudaMark, HostMark, TimedRound, summary, timed


class Outcomes:
    def __init__(self, rows: int) -> None:
        self.slots = [0] * rows


class Draft:
    """Work that takes 30 us, q that takes 5."""

    def exchange(self, outcomes: Outcomes) -> str:
        Device.now += 30
        return "drafts"

    def logits_into(self, outcomes: Outcomes, drafts: str, logits: None) -> None:
        Device.now += 5


class Device:
    """A mark of a device whose clock the work moves."""

    now: ClassVar[float] = 0
    held: ClassVar[int] = 0
    early: ClassVar[bool] = False

    def __init__(self) -> None:
        self.at = Device.now

    @classmethod
    def hold(cls) -> None:
        cls.held += 1

    def reached(self) -> bool:
        return Device.early

    def microseconds_to(self, later: Device) -> float:
        return later.at - self.at


@pytest.fixture(autouse=True)
def _new_device() -> None:
    Device.now, Device.held, Device.early = 0, 0, False


def rounds_of(*sizes: int, sampled: bool = True) -> list[TimedRound]:
    draft = Draft()
    with timed(draft, Device) as rounds:
        for rows in sizes:
            drafts = draft.exchange(Outcomes(rows))
            Device.now += 1000  # what the runner does in between is none of it
            if sampled:
                draft.logits_into(Outcomes(rows), drafts, None)
    assert not vars(draft), "what was wrapped is as it was"
    return rounds


def test_a_round_is_timed_from_the_outcomes_to_q() -> None:
    found = summary(rounds_of(*[2] * 8), 2)
    assert found["rounds"] == 5, "the first ones are left out"
    assert (found["look_up_us"], found["q_us"]) == (30, 1005)
    assert found["us"] == found["most_us"] == 1035
    assert Device.held == 8


def test_rounds_of_another_size_are_not_counted() -> None:
    assert summary(rounds_of(*[1, 2] * 6), 2)["rounds"] == 3


def test_a_round_of_drafts_without_q_ends_where_they_are_looked_up() -> None:
    """As coupled ones are, which is the default."""
    found = summary(rounds_of(*[2] * 8, sampled=False), 2)
    assert (found["rounds"], found["us"], found["look_up_us"], found["q_us"]) == (5, 30, 30, 0)
    Device.early = True
    assert summary(rounds_of(*[2] * 6, sampled=False), 2) == {"batch": 2, "rounds": 0, "late": 3}


def test_rounds_that_the_device_began_too_early_are_left_out() -> None:
    Device.early = True
    assert summary(rounds_of(*[2] * 6), 2) == {"batch": 2, "rounds": 0, "late": 3}


def test_the_twin_of_a_cpu_times_the_calls() -> None:
    draft: Any = Draft()
    with timed(draft, HostMark) as rounds:
        for _ in range(5):
            draft.logits_into(Outcomes(1), draft.exchange(Outcomes(1)), None)
    found = summary(rounds, 1)
    assert found["rounds"] == 2
    assert 0 <= found["us"] < 1e6


def test_on_a_gpu_the_device_is_done_and_then_busy_before_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("mark")

        def query(self) -> bool:
            return False

        def elapsed_time(self, later: Event) -> float:
            return 0.04

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: calls.append("done"))
    monkeypatch.setattr("torch.cuda._sleep", lambda cycles: calls.append("busy"))
    draft = Draft()
    with timed(draft, CudaMark) as rounds:
        for _ in range(4):
            draft.logits_into(Outcomes(1), draft.exchange(Outcomes(1)), None)
    assert calls == ["done", "busy", "mark", "mark", "mark"] * 4
    assert summary(rounds, 1)["us"] == 80
