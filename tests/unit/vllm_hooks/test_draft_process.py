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
    loop: Any = SimpleNamespace(advance=lambda: False)
    with pytest.raises(TargetGone):
        draft_process.serve(end, loop)
    assert told == [1, 3, 7, 15, 31, 63]
