"""What a hit costs on the device: the part of a round that the target's stream waits for.

That is `exchange` up to where the target goes on (outcomes taken in, looked up, drafts gathered) and, where drafts have
a q, its hand-over (`logits_into`), between events of the target's stream. Shapes are static, so a miss costs the same.
In serving the host is ahead of the device; so that it is here, too, the device is first kept busy until all is
enqueued: the time between two events is then that of the work, with the change from stream to stream, and not that of
the launches. Rounds of which the device had begun earlier are left out. The draft's round before is waited for, or it
would be in the time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch

BUSY_CYCLES = 20_000_000
"""The device spins so long, some 10 ms, while a round is enqueued."""

_FIRST = 3
"""Rounds that are not counted: kernels may be compiled, tables are not there yet."""


class Mark(Protocol):
    """A moment in the order of the target's stream."""

    def reached(self) -> bool:
        """Whether the device is there."""
        ...

    def microseconds_to(self, later: Any) -> float:
        """Between two marks that are both reached."""
        ...


class CudaMark:
    """An event of the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    @classmethod
    def hold(cls) -> None:
        """Let the device finish, and then keep it busy for a while: all before a round that is to be timed."""
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)

    def reached(self) -> bool:
        """Whether the device is there."""
        return self._event.query()

    def microseconds_to(self, later: CudaMark) -> float:
        """Between two marks that are both reached."""
        return 1000 * self._event.elapsed_time(later._event)


class HostMark:
    """The twin on a CPU, where work is done when its call returns: a time of the host, which says nothing of a GPU."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    @classmethod
    def hold(cls) -> None:
        """Nothing is under way."""

    def reached(self) -> bool:
        """Never before the round is enqueued, as it should be on a GPU."""
        return False

    def microseconds_to(self, later: HostMark) -> float:
        """Between two marks."""
        return 1e6 * (later._at - self._at)


@dataclass(slots=True)
class TimedRound:
    """begin, looked_up: around `exchange`; end: after q, where drafts have one.

    late: the device did not wait for all to be enqueued.
    """

    rows: int
    begin: Mark
    looked_up: Mark
    end: Mark
    late: bool


@contextlib.contextmanager
def timed(draft: Any, mark: Any) -> Iterator[list[TimedRound]]:
    """The rounds of a `DeviceDraft` while this lasts; `mark` is `CudaMark` or `HostMark`."""
    rounds: list[TimedRound] = []
    exchange, logits_into = draft.exchange, draft.logits_into

    def timed_exchange(outcomes: Any) -> Any:
        mark.hold()
        begin = mark()
        drafts = exchange(outcomes)
        looked_up = mark()
        # Coupled drafts have no q: nobody asks for one, and this is the end.
        rounds.append(TimedRound(len(outcomes.slots), begin, looked_up, looked_up, begin.reached()))
        return drafts

    def timed_logits(*arguments: Any) -> None:
        logits_into(*arguments)
        rounds[-1].end = mark()
        rounds[-1].late = rounds[-1].begin.reached()

    with mock.patch.object(draft, "exchange", timed_exchange), mock.patch.object(draft, "logits_into", timed_logits):
        yield rounds


def summary(rounds: list[TimedRound], batch: int) -> dict[str, Any]:
    """Medians in microseconds over the rounds of a whole batch, once the device has done them."""
    whole = [each for each in rounds if each.rows == batch][_FIRST:]
    kept = [each for each in whole if not each.late]
    answer: dict[str, Any] = {"batch": batch, "rounds": len(kept), "late": len(whole) - len(kept)}
    if kept:
        look_up = [each.begin.microseconds_to(each.looked_up) for each in kept]
        q = [each.looked_up.microseconds_to(each.end) for each in kept]
        both = [a + b for a, b in zip(look_up, q, strict=True)]
        for name, values in (("us", both), ("look_up_us", look_up), ("q_us", q)):
            answer[name] = round(statistics.median(values), 1)
        answer["most_us"] = round(max(both), 1)
    return answer
