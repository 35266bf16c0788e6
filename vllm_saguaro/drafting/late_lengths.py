"""How long the texts are, as far as the host has heard: lengths that the device sends back, without anyone waiting.

The host owns the blocks but never sees an outcome. Without news it would have to reckon with K + 1 tokens in every
step; with news that is a step or two old it reckons with that for a step or two alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

GIVEN_UP = -1
"""In the place of the length of a text that the device has given up."""


class Mark(Protocol):
    """A point in a queue of device work."""

    def reached(self) -> bool:
        """Whether all work before it is done. Does not wait."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    mark: Mark
    buffer: int
    slots: Sequence[int]
    step: int


class LateLengths:
    """Copies of the lengths of all slots, on their way to the host: a few at a time, none where none is left."""

    def __init__(self, length: Tensor, alive: Tensor, mark: Callable[[], Mark], copies: int = 4) -> None:
        """`length` [S] int32 and `alive` [S] bool are on the device.

        `mark()`: a point after what the current queue has been given so far.
        """
        pinned = length.device.type == "cuda"
        self._length, self._alive, self._mark = length, alive, mark
        self._buffers = [torch.zeros(length.shape, dtype=torch.int32, pin_memory=pinned) for _ in range(copies)]
        self._views: list[np.ndarray] = [buffer.numpy() for buffer in self._buffers]
        self._free = list(range(copies))
        self._sent: deque[_Sent] = deque()
        self._steps = 0

    @property
    def step(self) -> int:
        """How many steps were sent, or would have been."""
        return self._steps

    def send(self, slots: Sequence[int]) -> None:
        """Have the lengths of these slots come, as they are at this point of the device's queue."""
        self._steps += 1
        if not self._free:
            return
        buffer = self._free.pop()
        self._buffers[buffer].copy_(torch.where(self._alive, self._length, GIVEN_UP), non_blocking=True)
        self._sent.append(_Sent(self._mark(), buffer, slots, self._steps))

    def news(self) -> list[tuple[int, int, int]]:
        """What has come since the last call: (slot, length or GIVEN_UP, step), the newest of each slot last."""
        found = []
        while self._sent and self._sent[0].mark.reached():
            sent = self._sent.popleft()
            view = self._views[sent.buffer]
            found += [(slot, int(view[slot]), sent.step) for slot in sent.slots]
            self._free.append(sent.buffer)
        return found
