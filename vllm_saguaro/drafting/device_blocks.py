"""Which KV blocks each slot has. The host owns the allocation; the device only swaps ids within what a slot has.

The host does not know how long a text is, only how long it can be at most. So a slot gets blocks for that, its branches
a set each, and gives all of them back when it is released. On a hit the device swaps ids between the two (`adopt`): the
set stays the same. All work on the draft's KV is in the order of one stream, so that blocks given back may be given out
again at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_saguaro.drafting.device_model import NULL_BLOCK
from vllm_saguaro.drafting.kv import BlockPool, blocks_for

AHEAD = 3
"""Blocks that a slot gets beyond what it needs at once, where there are plenty: fewer updates of its table."""


def private_blocks(block_size: int, num_speculative_tokens: int) -> int:
    """P: the blocks that a branch owns, wherever in a block it begins."""
    return blocks_for(block_size - 1 + num_speculative_tokens, block_size)


@dataclass(slots=True)
class Holding:
    """The blocks of one slot: `main` in the order in which they were appended, `private` of one branch after another.

    The device has swapped some of them since; together they are what the slot has.
    """

    main: list[int]
    private: list[int] = field(default_factory=list)


class BlockLedger:
    """Hands out blocks by slot, all but the null block."""

    def __init__(self, num_blocks: int, block_size: int, max_length: int, num_speculative_tokens: int) -> None:
        self.width = blocks_for(max_length, block_size)
        """W: entries in the table of a text of the greatest length."""
        self.private_blocks = private_blocks(block_size, num_speculative_tokens)
        self._block_size, self._num_drafts = block_size, num_speculative_tokens
        self._pool = BlockPool(num_blocks)
        null = self._pool.take(1)
        assert null == [NULL_BLOCK]
        self._held: dict[int, Holding] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return self._pool.num_free

    def holding(self, slot: int) -> Holding:
        """What a slot has; KeyError where it has nothing."""
        return self._held[slot]

    def needed(self, length: int) -> int:
        """Table entries that a round of a text of at most `length` tokens touches, with the bonus token.

        The branch that is adopted begins in the block of the bonus token, and the glue token is K further on.
        """
        last = max(length - 1, 0)
        adopted = last // self._block_size + self.private_blocks
        return min(self.width, max(adopted, (last + self._num_drafts) // self._block_size + 1))

    def admit(self, slot: int, length: int, branches: int) -> Holding | None:
        """Blocks for a text of `length` tokens and as many of `branches` branches as there is room for.

        None where there is no room for one: then the slot has nothing. It must have nothing before.
        """
        assert slot not in self._held, "the slot has blocks"
        main = self._pool.take(self.needed(length))
        if main is None:
            return None
        count = min(branches, self._pool.num_free // self.private_blocks)
        private = self._pool.take(count * self.private_blocks)
        if not private:
            self._pool.give(main)
            return None
        self._held[slot] = Holding(main, private)
        return self._held[slot]

    def grow(self, slot: int, length: int) -> tuple[int, list[int]] | None:
        """Blocks for a text of at most `length` tokens: where in the table the new ones begin, and which they are.

        None where there are not enough: then nothing has changed.
        """
        main = self._held[slot].main
        first = len(main)
        missing = self.needed(length) - first
        if missing <= 0:
            return first, []
        ahead = min(self.width, self.needed(length) + AHEAD) - first
        more = self._pool.take(ahead if self._pool.num_free >= 8 * ahead else missing)
        if more is None:
            return None
        main += more
        return first, more

    def release(self, slot: int) -> None:
        """Take back all that a slot has, if it has anything."""
        holding = self._held.pop(slot, None)
        if holding is not None:
            self._pool.give(holding.main)
            self._pool.give(holding.private)
