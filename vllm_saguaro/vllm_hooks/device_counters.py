"""Hits and misses under runner V2, counted on the device and read on the host without waiting.

The counts travel by a copy in stream order into pinned memory, and the host reads what has arrived: it may be a few
steps behind, never in the way.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_saguaro import counters
from vllm_saguaro.algorithm.step_outcomes import ABSENT, HIT, NOT_PREDICTED
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Miss

_COUNTED = (
    (HIT, counters.HITS),
    (NOT_PREDICTED, counters.MISSES[Miss.NOT_PREDICTED]),
    (ABSENT, counters.MISSES[Miss.ABSENT]),
)


class DeviceCounters:
    """The counts that `algorithm.step_outcomes.book_drafts` adds to, and their copy on the host."""

    def __init__(self, page: CounterPage, device: torch.device) -> None:
        """`page`: where the counts are shown."""
        self._page = page
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        """[4] int64, on the device."""
        arrived = torch.zeros(4, dtype=torch.int64)
        self._arrived = arrived.pin_memory() if device.type == "cuda" else arrived
        self._seen: np.ndarray = np.zeros(4, dtype=np.int64)
        self._view = self._arrived.numpy()

    def counted(self) -> None:
        """A step has been counted: its counts are to follow, and those that have arrived are shown."""
        self._arrived.copy_(self.counts, non_blocking=True)
        self.publish()

    def drafted(self, drafts: int, branches: int | None) -> None:
        """A step: how many drafts a request has to verify, and its branches (None: not known)."""
        self._page.set(counters.DRAFTS, drafts)
        if branches is not None:
            self._page.set(counters.BRANCHES, branches)

    def drew(self, c: float | None) -> None:
        """A step with sampled rows: C of Saguaro sampling now."""
        self._page.set(counters.SAMPLING_C, c)

    def gave_up(self) -> None:
        """The draft has failed, and is not started again."""
        self._page.set(counters.SAMPLING_C, None)
        self._page.set(counters.DRAFTS, 0)
        self._page.set(counters.BRANCHES, 0)
        self._page.set(counters.DRAFT_LEFT_OFF, 1)

    def ended(self) -> None:
        """The draft that was given up has been closed. From any thread."""
        self._page.set(counters.DRAFT_UP, 0)

    def publish(self) -> None:
        """Add to the page what has arrived since the last time."""
        arrived = self._view.copy()
        for index, counter in _COUNTED:
            self._page.add(counter, int(arrived[index] - self._seen[index]))
        self._seen = arrived
