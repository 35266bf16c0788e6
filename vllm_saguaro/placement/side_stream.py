"""The order between the target's work and the draft's: a CUDA stream with events, and its twin where nothing overlaps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

TARGET_PRIORITY = -1
"""CUDA's priorities: a lower number goes first, 0 is the last there is. Streams are made with 0."""


class SideStream(Protocol):
    """A queue of device work beside the current one, which is the target's."""

    def follow(self) -> None:
        """What is queued here from now on waits for all that the current stream has been given so far."""
        ...

    def lead(self) -> None:
        """What the current stream is given from now on waits for all that is queued here so far."""
        ...

    def entered(self) -> AbstractContextManager[None]:
        """Work that is begun inside is queued here."""
        ...

    def wait(self) -> None:
        """The host waits until all that is queued here is done: before closing, never in a step."""
        ...


class CudaSideStream:
    """A stream of the lowest priority. `follow` and `lead` have an event each, made once and recorded anew.

    An event that is waited for may be recorded again at once: a wait holds to the record that it found.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=0)
        self._device = device
        self._begun = torch.cuda.Event()
        self._done = torch.cuda.Event()

    def follow(self) -> None:
        """What is queued here from now on waits for all that the current stream has been given so far."""
        self._begun.record(torch.cuda.current_stream(self._device))
        self.stream.wait_event(self._begun)

    def lead(self) -> None:
        """What the current stream is given from now on waits for all that is queued here so far."""
        self._done.record(self.stream)
        torch.cuda.current_stream(self._device).wait_event(self._done)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work that is begun inside is queued here."""
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """The host waits until all that is queued here is done."""
        self.stream.synchronize()


class InlineStream:
    """The twin on a CPU: work is done when its call returns, so every order holds already."""

    def follow(self) -> None:
        """Nothing is under way."""

    def lead(self) -> None:
        """Nothing is under way."""

    def entered(self) -> AbstractContextManager[None]:
        """Work goes where it goes anyway."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Nothing is under way."""


def side_stream(device: torch.device) -> SideStream:
    """The stream of a device: CUDA's, or its twin elsewhere."""
    return CudaSideStream(device) if device.type == "cuda" else InlineStream()
