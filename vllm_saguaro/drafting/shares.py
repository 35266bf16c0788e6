"""What several engines share that are drafted for by one model: its KV blocks, and the rows of a forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_saguaro.drafting.kv import BlockPool


class BlockShares:
    """One pool of KV blocks for several engines.

    Each is sure of an equal part of all blocks, and gets no more. What it has beyond, from a time with fewer engines,
    it keeps until it gives it back.
    """

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._shares: list[BlockShare] = []

    def __len__(self) -> int:
        return len(self._shares)

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return self._pool.num_free

    def part(self, engines: int) -> int:
        """Blocks that each of so many engines is sure of."""
        return self._pool.num_blocks // max(engines, 1)

    def join(self) -> BlockShare:
        """One more engine."""
        share = BlockShare(self)
        self._shares.append(share)
        return share

    def leave(self, share: BlockShare) -> None:
        """An engine has left: all that it has is free again."""
        self._shares.remove(share)
        self._pool.give(share.taken)
        share.taken.clear()

    def free_for(self, share: BlockShare) -> int:
        """Blocks that this engine may take now."""
        part = self.part(len(self._shares))
        kept = sum(max(0, part - len(other.taken)) for other in self._shares if other is not share)
        return max(0, self._pool.num_free - kept)

    def take(self, share: BlockShare, count: int) -> list[int] | None:
        """`count` blocks, or None."""
        return self._pool.take(count) if count <= self.free_for(share) else None

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._pool.give(blocks)


class BlockShare:
    """One engine's blocks. It stands where the engine would have a `BlockPool` of its own."""

    def __init__(self, shares: BlockShares) -> None:
        self._shares = shares
        self.taken: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """All blocks, whoever has them."""
        return self._shares.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that may be taken now."""
        return self._shares.free_for(self)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None when there are not enough: then nothing is taken."""
        blocks = self._shares.take(self, count)
        if blocks is not None:
            self.taken.update(blocks)
        return blocks

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        given = list(blocks)
        self.taken.difference_update(given)
        self._shares.give(given)


def fair_parts(demands: Sequence[int], total: int) -> list[int]:
    """How much of `total` each gets: what it asks for, as long as that is no more than an equal part of what the others
    leave (max-min fairness). Whole numbers; the sum is at most `total`.
    """
    parts = [0] * len(demands)
    left, waiting = total, sorted(range(len(demands)), key=lambda i: demands[i])
    for done, i in enumerate(waiting):
        parts[i] = min(demands[i], left // (len(waiting) - done))
        left -= parts[i]
    return parts
