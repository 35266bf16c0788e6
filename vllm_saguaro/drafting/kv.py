"""Blocks of the draft's paged KV cache: who has which, and how branches share them.

A branch that starts at position P shares the request's full blocks below P and owns private blocks from block
`P // block_size` on; the first of them starts as a copy of the request's block when P lies inside it (copy on write).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Blocks(Protocol):
    """Where an engine takes its blocks from: a pool of its own, or its share of one (`shares.py`)."""

    @property
    def num_blocks(self) -> int:
        """Block ids are 0 .. num_blocks - 1."""
        ...

    @property
    def num_free(self) -> int:
        """Blocks that may be taken now."""
        ...

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None when there are not enough: then nothing is taken."""
        ...

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        ...


class BlockPool:
    """Free blocks of the draft's KV cache, handed out last-in-first-out so that warm memory is used again."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None when there are not enough: then nothing is taken."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._free.extend(blocks)


@dataclass(frozen=True, slots=True)
class BranchSpan:
    """The blocks a branch owns in its row, `first` .. `first + count - 1`; `copies` when it starts inside the first."""

    first: int
    count: int
    copies: bool


def branch_span(position: int, steps: int, block_size: int) -> BranchSpan:
    """The private blocks of a branch that writes KV at `position` .. `position + steps - 1`."""
    first = position // block_size
    last = (position + steps - 1) // block_size
    return BranchSpan(first, last - first + 1, copies=position % block_size != 0)


def blocks_for(length: int, block_size: int) -> int:
    """Blocks that hold `length` tokens."""
    return -(-length // block_size)


def pad_blocks(rows: list[list[int]]) -> np.ndarray:
    """Block tables of several rows as one [R, W] int32 array, padded with 0."""
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table
