"""A step of the target's device at the mailbox: the tables are copied, the drafts found, and the record written.

Four copies of tables (`device_tables.py`), a kernel that takes the outcomes in and finds their drafts, one that seals
the record, and two copies of that: what lies between the target's sampling and its next pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_saguaro.device_messages import DeviceOutcomes
from vllm_saguaro.placement.device_tables import CopyOperations, TableCopies, TableReader
from vllm_saguaro.placement.layout import RECORD_HEADER, MailboxShape
from vllm_saguaro.placement.records import DRAFTS, NUMBER, head_weight


class StepOperations(CopyOperations, Protocol):
    """Of `Operations`, what a step needs."""

    @property
    def take_drafts(self) -> Callable[..., None]:
        """`take_drafts` of `algorithm.step_records`, or its kernel."""
        ...

    @property
    def seal_record(self) -> Callable[..., None]:
        """`seal_record` of `algorithm.step_records`, or its kernel."""
        ...


@dataclass(frozen=True, slots=True)
class GivenRows:
    """What B rows of a step were given, in buffers that the next step writes anew.

    stamps [B, 3] int64: generation, round and sequence of the table; branch [B] int64: which of its branches, 0 where
    none was hit; tokens [B, K] int64, ready [B] int32: as in `DeviceDrafts`. recorded [B, K] int64: the tokens as they
    are in the record, where nobody else writes.
    """

    stamps: Tensor
    branch: Tensor
    tokens: Tensor
    ready: Tensor
    recorded: Tensor


class DeviceStep:
    """What the device knows of each slot, and the buffers of a step. Enqueues only."""

    def __init__(self, shape: MailboxShape, device: torch.device, operations: StepOperations) -> None:
        """`operations`: those for `device`."""
        self._shape, self._device, self._do = shape, device, operations
        slots, depths, long = shape.slots, shape.num_speculative_tokens, torch.int64
        self.state = torch.zeros(slots, 3, dtype=long, device=device)
        """[S, 3] int64, of each slot: generation, round, drafts under verification."""
        self._record = torch.zeros(shape.record_words, dtype=long, device=device)
        self._stamps = torch.zeros(slots, 3, dtype=long, device=device)
        self._branch = torch.zeros(slots, dtype=long, device=device)
        self._tokens = torch.zeros(slots, depths, dtype=long, device=device)
        self._ready = torch.zeros(slots, dtype=torch.int32, device=device)
        own = self.state, self._record, self._stamps, self._branch, self._tokens, self._ready
        self.resident_bytes = sum(tensor.nbytes for tensor in own)
        """Device memory held for good."""

    def compile(self, reader: TableReader, with_q: bool) -> None:
        """Take a step of a row that gets no token, and send nothing: kernels are compiled now, not as requests wait."""
        word, number = (torch.zeros(1, dtype=dtype, device=self._device) for dtype in (torch.int64, torch.int32))
        outcomes = DeviceOutcomes(word, number - 1, number, word, number, number.float(), (), np.zeros(1, np.int64))
        given = self.take(reader.tables(word), outcomes)
        self._do.seal_record(self._record, 1, self._shape.row_words, 0, 0)
        if with_q:
            reader.proposals(word, given.stamps, given.branch)

    def take(self, found: TableCopies, outcomes: DeviceOutcomes) -> GivenRows:
        """Find the drafts of a step in copies of its tables, and write the rows of its record."""
        rows = len(outcomes.slots)
        told = self._record[RECORD_HEADER : RECORD_HEADER + rows * self._shape.row_words].view(rows, -1)
        given = GivenRows(
            stamps=self._stamps[:rows],
            branch=self._branch[:rows],
            tokens=self._tokens[:rows],
            ready=self._ready[:rows],
            recorded=told[:, DRAFTS:],
        )
        self._do.take_drafts(
            *(found.before, found.head, found.body, found.after),
            self.state,
            *(outcomes.slots, outcomes.accepted, outcomes.verified, outcomes.bonus, outcomes.lengths),
            self._shape.vocab_size,
            *(told, given.stamps, given.branch, given.tokens, given.ready),
        )
        return given

    def send_record(self, rows: int, number: int, records: Tensor, newest: Tensor) -> None:
        """Copy the record of a step to the place of its number in `records`, and then the number to `newest`."""
        words = self._shape.row_words
        self._do.seal_record(self._record, rows, words, number, head_weight(number, rows))
        record = self._record[: RECORD_HEADER + rows * words]
        records[number % self._shape.device_steps, : len(record)].copy_(record, non_blocking=True)
        newest.copy_(record[NUMBER : NUMBER + 1], non_blocking=True)
