"""Tables and q of a mailbox as the target's device reads them: by kernels, in stream order, the rows of a step alone.

The draft process writes whenever it likes, so everything is read between two looks at a word that says which table is
there (the sequence of the cell, the stamp of the q). What makes that sound is the order alone, and a stream gives it:
a kernel reads nothing before the one in front of it has read all of its own. So each line below is one kernel that
copies words out of the registered memory, and nothing of them is looked at before the last:

    sequence    which table the end of the copy must still find
    head        with the depth: a draft that it counts was written before it was counted
    body        the keys, and the drafts of every depth
    sequence    equal and even: no table was begun in between, so keys and head are whole and of one table

The depth has a copy of its own between the two looks. In one copy with the sequence it might be that of the table
before, with the body it might count drafts that the same copy passed by a moment too early. The drafts above it, and
the entries beyond the number of branches, are whatever was there before, and are masked.

The q is read in the same way between two looks at its stamp, which names the table by its sequence. The draft side
takes the stamp away before it writes anything that is not of that table, and counts a depth after its q is there.

Bytes that cross for a step of B rows, however many slots there are: 8 B (8 + N (1 + K)) of tables, 127 KB at B = 64,
N = 48, K = 4; and 8 B (6 + K M) of q where drafts are sampled, another 134 KB with M = 64 candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_saguaro.placement.layout import CELL_HEADER, CONTROL_WORDS, Q_HEADER, MailboxShape

_SEQUENCE = 0
"""Of the words of a cell."""


@dataclass(slots=True)
class TableCopies:
    """The tables of B rows as they were copied, in this order: `algorithm.step_records.tables_of` says what to believe.

    before [B], head [B, 6], body [B, N (1 + K)], after [B]; all int64, on the device.
    """

    before: Tensor
    head: Tensor
    body: Tensor
    after: Tensor


class CopyOperations(Protocol):
    """Of `Operations`, what reads words that another process writes."""

    @property
    def copy_rows(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`copy_rows` of `algorithm.step_records`, or its kernel."""
        ...

    @property
    def copy_branches(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`copy_branches` of `algorithm.step_records`, or its kernel."""
        ...


class TableReader:
    """Reads tables and q of one life of the draft side."""

    def __init__(self, words: Tensor, shape: MailboxShape, operations: CopyOperations) -> None:
        """`words` int64: the mailbox as kernels reach it, up to its ring, or up to its q where nobody asks for q."""
        self._shape, self._do = shape, operations
        depths, branches, support = shape.num_speculative_tokens, shape.branches, shape.support
        cells = words[CONTROL_WORDS : shape.tables_bytes // 8].view(shape.slots, shape.cell_words)
        self._sequences = cells[:, _SEQUENCE]
        self._heads = cells[:, :CELL_HEADER]
        self._bodies = cells[:, CELL_HEADER:]
        q = words[shape.q_at // 8 : shape.ring_at // 8].view(-1, shape.q_words)  # no rows where it is left out
        self._q_stamps = q[:, :Q_HEADER]
        self._q = q[:, Q_HEADER:].unflatten(1, (depths, branches, support))

    def tables(self, slots: Tensor) -> TableCopies:
        """What lies there of the tables of `slots` [B] int64, read in an order that shows whether it is whole."""
        return TableCopies(
            before=self._do.copy_rows(self._sequences, slots),
            head=self._do.copy_rows(self._heads, slots),
            body=self._do.copy_rows(self._bodies, slots),
            after=self._do.copy_rows(self._sequences, slots),
        )

    def proposals(self, slots: Tensor, stamps: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The q of the drafts of one branch in each slot, of the table with this stamp [B, 3] int64.

        tokens [B, K, M] int64 and probabilities [B, K, M] float32 of the candidates, as they lie there; and there [B]
        bool: whether they are of this very table, up to its depth at least.
        """
        cells = 2 * slots + (stamps[:, 1] & 1)
        before = self._do.copy_rows(self._q_stamps, cells)
        raw = self._do.copy_branches(self._q, cells, branch)
        after = self._do.copy_rows(self._q_stamps, cells)
        there = ((before == stamps) & (after == stamps)).all(1)
        halves = raw.contiguous().view(torch.int32).unflatten(-1, (2, self._shape.support))
        return halves[..., 0, :].to(torch.int64), halves[..., 1, :].view(torch.float32), there
