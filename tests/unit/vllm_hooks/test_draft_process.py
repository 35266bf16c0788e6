"""The loop that looks into the mailbox, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_saguaro.messages import Step
from vllm_saguaro.placement.draft_end import TargetGone
from vllm_saguaro.vllm_hooks import draft_process


class Damaged:
    """An end out of whose mailbox nothing but damaged steps come."""

    def __init__(self, steps: int) -> None:
        self.mailbox: Any = self
        self.steps, self.dropped, self.from_device = steps, 0, False

    def receive(self) -> Step | None:
        self.dropped += 1
        return None

    def idle(self, since: float, may_sleep: bool = True) -> None:
        if self.dropped >= self.steps:
            raise TargetGone


def test_steps_that_were_dropped_are_told_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(draft_process, "tell_dropped", told.append)
    end: Any = Damaged(100)
    loop: Any = SimpleNamespace(rests=False, advance=lambda: False)
    with pytest.raises(TargetGone):
        draft_process.serve(end, loop)
    assert told == [1, 3, 7, 15, 31, 63]


class Quiet:
    """An end to which nothing comes; it ends after so many waits, and notes whether each may be a sleep."""

    def __init__(self, waits: int) -> None:
        self.mailbox: Any = self
        self.dropped, self.from_device, self.left = 0, False, waits
        self.sleeps: list[bool] = []

    def receive(self) -> Step | None:
        return None

    def idle(self, since: float, may_sleep: bool = True) -> None:
        self.sleeps.append(may_sleep)
        self.left -= 1
        if not self.left:
            raise TargetGone


class Resting:
    """A loop that rests twice, after its first forward."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.forwards = 0

    @property
    def rests(self) -> bool:
        self.asked.append(self.forwards == 1 and self.asked.count(True) < 2)
        return self.asked[-1]

    def advance(self) -> bool:
        self.forwards += 1
        return self.forwards < 3


def test_while_the_loop_rests_nothing_is_begun_and_no_bell_is_waited_for() -> None:
    end: Any = Quiet(3)
    loop: Any = Resting()
    with pytest.raises(TargetGone):
        draft_process.serve(end, loop)
    assert loop.asked == [False, True, True, False, False]
    assert loop.forwards == 3
    assert end.sleeps == [False, False, True]
