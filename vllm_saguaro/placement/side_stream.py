"""The order between the target's work and the draft's: a CUDA stream with events, and a twin where nothing overlaps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_saguaro.drafting.late_lengths import Mark


class SideStream(Protocol):
    """A queue of device work beside the current one, which is the target's."""

    @property
    def cuda(self) -> torch.cuda.Stream | None:
        """The stream itself, where there is one."""
        ...

    def follow(self) -> None:
        """What is queued here from now on waits for all that the current stream has been given so far."""
        ...

    def lead(self) -> None:
        """What the current stream is given from now on waits for all that is queued here so far."""
        ...

    def entered(self) -> AbstractContextManager[None]:
        """Work that is begun inside is queued here."""
        ...

    def mark(self) -> Mark:
        """A point after all that is queued here so far."""
        ...

    def wait(self) -> None:
        """The host waits until all that is queued here is done: before closing, never in a step."""
        ...


class CudaSideStream:
    """A stream of the lowest priority. `follow` and `lead` have an event each, made once and recorded anew.

    An event that is waited for may be recorded again at once: a wait holds to the record that it found.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda: torch.cuda.Stream = torch.cuda.Stream(device, priority=0)
        self._device = device
        self._begun = torch.cuda.Event()
        self._done = torch.cuda.Event()

    def follow(self) -> None:
        """What is queued here from now on waits for all that the current stream has been given so far."""
        self._begun.record(torch.cuda.current_stream(self._device))
        self.cuda.wait_event(self._begun)

    def lead(self) -> None:
        """What the current stream is given from now on waits for all that is queued here so far."""
        self._done.record(self.cuda)
        torch.cuda.current_stream(self._device).wait_event(self._done)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work that is begun inside is queued here."""
        with torch.cuda.stream(self.cuda):
            yield

    def mark(self) -> Mark:
        """A point after all that is queued here so far."""
        event = torch.cuda.Event()
        event.record(self.cuda)
        return _EventMark(event)

    def wait(self) -> None:
        """The host waits until all that is queued here is done."""
        self.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class _EventMark:
    event: torch.cuda.Event

    def reached(self) -> bool:
        return self.event.query()


class _DoneMark:
    def reached(self) -> bool:
        return True


class InlineStream:
    """The twin on a CPU: work is done when its call returns, so every order holds already."""

    cuda: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Nothing is under way."""

    def lead(self) -> None:
        """Nothing is under way."""

    def entered(self) -> AbstractContextManager[None]:
        """Work goes where it goes anyway."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """Nothing is under way."""
        return _DoneMark()

    def wait(self) -> None:
        """Nothing is under way."""


def side_stream(device: torch.device) -> SideStream:
    """The stream of a device: CUDA's, or its twin elsewhere."""
    return CudaSideStream(device) if device.type == "cuda" else InlineStream()
