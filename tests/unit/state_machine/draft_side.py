"""The draft side without a process of its own, compared with the oracle in all that it holds and publishes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.unit.drafting.checks import check_blocks
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.state_machine.surface import blocks_written, entries_of, growing_tree, leaving
from tests.unit.state_machine.target import Oracle, Request
from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.kv import BlockPool
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.drafting.trunk import Tree, Trunk
from vllm_saguaro.messages import GONE, Stamp, Table
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape


@dataclass(frozen=True, slots=True)
class Sizes:
    """What differs from one run to the next."""

    num_speculative_tokens: int
    branches: int
    slots: int
    num_blocks: int
    ring_bytes: int
    backup: str
    method: str
    max_length: int = 36
    vocab_size: int = 8
    """Few tokens, so that one outcome follows another like it and a stale table would be found."""

    @property
    def plenty(self) -> bool:
        """Whether there are always blocks for everybody."""
        return self.num_blocks >= 200


@dataclass(slots=True)
class Round:
    """What both sides must agree on under one stamp: the text, and the drafts under verification."""

    request: Request
    text: list[int]
    speculation: list[int]


class DraftSide:
    """A mailbox and the loop that reads it; every table is compared with the oracle as it is published."""

    def __init__(self, sizes: Sizes, rounds: dict[Stamp, Round], oracle: Oracle) -> None:
        self._rounds = rounds
        self._oracle = oracle
        steps, support = sizes.num_speculative_tokens, min(SUPPORT, sizes.vocab_size)
        self._steps = steps
        shape = MailboxShape(sizes.slots, sizes.branches, steps, sizes.ring_bytes, support)
        self.mailbox = Mailbox(memoryview(bytearray(shape.total_bytes)), shape)
        self.model = FakeModel(
            num_blocks=sizes.num_blocks,
            max_length=sizes.max_length,
            max_tokens=12,
            max_rows=12,
            vocab_size=sizes.vocab_size,
        )
        self.engine = DraftEngine(self.model, steps, sizes.branches, method=sizes.method, seed=1)
        self.loop = DraftLoop(self.engine, self._publish)

    def receive(self) -> bool:
        """Take one frame out of the mailbox, if there is one."""
        step = self.mailbox.receive()
        if step is not None:
            self.loop.submit(step)
        return step is not None

    def drain(self) -> None:
        """Everything that there is to do."""
        for _ in range(2000):
            if not self.receive() and not self.loop.advance():
                return
        raise AssertionError("the draft side does not come to rest")

    def _publish(self, table: Table) -> None:
        if table.stamp.round != GONE:
            self._check_newest_depth(table)
        self.mailbox.publish(table)

    def _check_newest_depth(self, table: Table) -> None:
        """Its last token of every branch is the oracle's after the text, the accepted drafts and the bonus token."""
        known = self._rounds[table.stamp]
        assert len(table.drafts) <= self._steps
        if not table.drafts:
            return
        for branch, (accepted, bonus) in enumerate(zip(table.accepted, table.bonus, strict=True)):
            assert accepted <= len(known.speculation)
            *before, newest = table.speculation(branch)
            text = [*known.text, *known.speculation[:accepted], bonus, *before]
            assert self._oracle.next_draft(known.request, text) in (None, newest), "a wrong draft is published"

    # ---- what must hold at any time ----------------------------------------------------------------------------

    def check(self) -> None:
        entries = entries_of(self.loop)
        check_blocks(self.engine, [*entries.values(), *leaving(self.loop)])
        for stamp, trunk in entries.items():
            known = self._rounds[stamp]
            assert trunk.tokens == known.text, "the two sides do not talk of the same text"
            assert trunk.speculation == known.speculation, "the two sides do not talk of the same drafts"
            self._check_kv(trunk)
        tree = growing_tree(self.loop)
        if tree is not None:
            self._check_tree(tree)

    def _check_kv(self, trunk: Trunk) -> None:
        """KV of the positions below `valid` is that of the text, and the hidden states are the oracle's."""
        text, valid, size = trunk.tokens + trunk.speculation, trunk.valid, self.model.block_size
        assert 0 <= valid <= len(text)
        at = np.arange(valid)
        assert len(trunk.blocks) * size >= valid
        held = self.model.kv[np.asarray(trunk.blocks, dtype=np.int64)[at // size], at % size]
        assert held.tolist() == text[:valid], "KV is taken for valid that is not"
        states = 0 if trunk.hidden is None else len(trunk.hidden)
        assert states == max(0, valid - len(trunk.tokens) + 1)
        if trunk.hidden is not None:
            for end, logits in enumerate(self.model.logits(trunk.hidden), start=len(trunk.tokens)):
                assert logits.equal(self._oracle.logits_after(text[:end])), "a hidden state is of another text"

    def _check_tree(self, tree: Tree) -> None:
        """No block that the tree will still write into is free: who gets it next would find foreign tokens there."""
        written, pool = blocks_written(tree, self.model.block_size), self.engine.pool
        assert isinstance(pool, BlockPool)
        assert not written & set(pool._free), "a block is free that a tree still writes into"
