"""The draft engine: a request's text and KV, its branches, and the four things that happen to them.

`extend` brings the KV up to date (prefill and glue are the same thing), `fork` chooses the likeliest outcomes and gives
each a branch, `grow` decodes one more token for all branches at once, and `settle` turns a request to its real outcome:
on a hit the branch's blocks become the request's own (no KV is copied), on a miss the text is cut back.

Invariant of a `Trunk`: KV is right for positions 0 .. valid - 1 of committed text plus drafts under verification, and
`hidden` holds the hidden states of positions len(tokens) - 1 .. valid - 1, from which outcomes are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_saguaro.algorithm import outcomes
from vllm_saguaro.drafting.kv import BlockPool, blocks_for, branch_span, pad_blocks
from vllm_saguaro.drafting.model import Batch, DraftModel


@dataclass(slots=True)
class Branch:
    """One predicted outcome being drafted: its own blocks from block `first` on, and what was drafted so far."""

    accepted: int
    bonus: int
    first: int
    blocks: list[int]
    row: int = -1
    """Row in the tree that grows this branch."""


@dataclass(slots=True)
class Trunk:
    """A request on the draft side: committed `tokens`, then the drafts under verification (`speculation`)."""

    tokens: list[int]
    temperature: float
    speculation: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    valid: int = 0
    hidden: torch.Tensor | None = None
    branches: list[Branch] = field(default_factory=list)
    tree: Tree | None = None

    @property
    def length(self) -> int:
        """Tokens of the whole trunk, drafts under verification included."""
        return len(self.tokens) + len(self.speculation)

    def pending(self) -> list[int]:
        """Tokens of the trunk whose KV is not there yet."""
        behind = self.valid - len(self.tokens)
        return self.speculation[behind:] if behind >= 0 else self.tokens[self.valid :] + self.speculation


@dataclass(slots=True)
class Tree:
    """The branches of some requests, growing together: one row each, all at the same depth.

    next_ids [R] int64: token that each row feeds next; start [R]: position of the bonus token; blocks [R, W].
    hidden[i] [R, H]: states after feeding the i-th token; drafts[i] [R]: the token drafted from them.
    """

    next_ids: np.ndarray
    start: np.ndarray
    blocks: np.ndarray
    depth_limit: int
    drafts: list[np.ndarray] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Tokens drafted so far in every row."""
        return len(self.drafts)

    @property
    def finished(self) -> bool:
        """Whether every row has its K tokens."""
        return self.depth >= self.depth_limit


class DraftEngine:
    """Trunks and branches over one `DraftModel`. Knows nothing of rounds, stamps or transports."""

    def __init__(self, model: DraftModel, num_speculative_tokens: int, branches: int, fan_out: str) -> None:
        self.model = model
        self.num_speculative_tokens = num_speculative_tokens
        self.branches = branches
        self.fan_out = fan_out
        self.pool = BlockPool(model.num_blocks)

    # ---- text and KV -------------------------------------------------------------------------------------------

    def admit(self, tokens: list[int], temperature: float) -> Trunk:
        """A request with this text; its KV comes with `extend`."""
        return Trunk(tokens=tokens, temperature=temperature)

    def release(self, trunk: Trunk) -> None:
        """Give back every block of a request."""
        self.drop_branches(trunk)
        self.pool.give(trunk.blocks)
        trunk.blocks, trunk.valid, trunk.hidden = [], 0, None

    def has_room_for(self, trunk: Trunk) -> bool:
        """Whether there are blocks for the whole trunk and one branch."""
        needed = blocks_for(trunk.length + self.num_speculative_tokens, self.model.block_size)
        return needed - len(trunk.blocks) <= self.pool.num_free

    @torch.inference_mode()
    def extend(self, trunks: list[Trunk], most: int) -> None:
        """Feed each trunk up to `most` of its pending tokens, in one forward.

        Prefill of a prompt, the glue token after a hit and the bonus token after a miss are all this. A trunk for which
        no block is left is passed over: its `valid` does not move.
        """
        block_size = self.model.block_size
        rows: list[tuple[Trunk, list[int]]] = []
        for trunk in trunks:
            fed = trunk.pending()[:most]
            missing = blocks_for(trunk.valid + len(fed), block_size) - len(trunk.blocks)
            more = self.pool.take(max(missing, 0))
            if fed and more is not None:
                trunk.blocks += more
                rows.append((trunk, fed))
        if not rows:
            return
        counts = [len(fed) for _, fed in rows]
        hidden = self.model.forward(
            Batch(
                token_ids=np.concatenate([np.asarray(fed, dtype=np.int64) for _, fed in rows]),
                positions=np.concatenate([np.arange(t.valid, t.valid + len(fed)) for t, fed in rows]),
                query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
                lengths=np.array([t.valid + len(fed) for t, fed in rows], dtype=np.int32),
                blocks=pad_blocks([t.blocks for t, _ in rows]),
            )
        )
        for (trunk, fed), states in zip(rows, hidden.split(counts), strict=True):
            start, trunk.valid = trunk.valid, trunk.valid + len(fed)
            # Only states from the last committed token on predict outcomes.
            states = states[max(0, min(len(trunk.tokens) - 1, trunk.valid) - start) :]
            if states.shape[0]:
                trunk.hidden = states if trunk.hidden is None else torch.cat([trunk.hidden, states])

    # ---- branches ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def fork(self, trunks: list[Trunk], branches: int | None = None) -> Tree | None:
        """Predict the N likeliest outcomes of each trunk (its KV must be complete) and give each a branch.

        Returns the tree that grows them, or None when no branch found room. Where blocks run short the least likely
        branches go without; a branch that would run past the model's maximum length is left out.
        """
        self._place(self._choose(trunks, branches or self.branches))
        block_size, steps = self.model.block_size, self.num_speculative_tokens
        source: list[int] = []
        destination: list[int] = []
        rows: list[list[int]] = []
        start: list[int] = []
        for trunk in trunks:
            for branch in trunk.branches:
                branch.row = len(rows)
                position = len(trunk.tokens) + branch.accepted
                if branch_span(position, steps, block_size).copies:
                    source.append(trunk.blocks[branch.first])
                    destination.append(branch.blocks[0])
                rows.append(trunk.blocks[: branch.first] + branch.blocks)
                start.append(position)
        if not rows:
            return None
        if source:
            self.model.copy_blocks(source, destination)
        tree = Tree(
            next_ids=np.array([b.bonus for t in trunks for b in t.branches], dtype=np.int64),
            start=np.array(start, dtype=np.int64),
            blocks=pad_blocks(rows),
            depth_limit=steps,
        )
        for trunk in trunks:
            trunk.tree = tree if trunk.branches else None
        return tree

    @torch.inference_mode()
    def grow(self, tree: Tree) -> None:
        """One more token for every branch of the tree: one row a branch, one forward."""
        rows = len(tree.next_ids)
        positions = tree.start + tree.depth
        hidden = self.model.forward(
            Batch(
                token_ids=tree.next_ids,
                positions=positions,
                query_start=np.arange(rows + 1, dtype=np.int32),
                lengths=(positions + 1).astype(np.int32),
                blocks=tree.blocks,
            )
        )
        tree.next_ids = self.model.greedy(hidden)
        tree.hidden.append(hidden)
        tree.drafts.append(tree.next_ids)

    def drafts_of(self, trunk: Trunk) -> list[np.ndarray]:
        """The tokens drafted so far: one array a depth, over the branches of the trunk."""
        tree = trunk.tree
        if tree is None:
            return []
        rows = slice(trunk.branches[0].row, trunk.branches[-1].row + 1)  # `fork` numbers them in a row
        return [step[rows] for step in tree.drafts]

    @torch.inference_mode()
    def settle(self, trunk: Trunk, accepted: int, bonus: int, speculation: list[int]) -> bool:
        """Turn a trunk to its real outcome; `speculation` is what goes into verification next. True on adoption.

        A branch is adopted when it predicted (accepted, bonus) and its drafts begin with `speculation` (they do, unless
        the target side got its drafts elsewhere). Otherwise the text is cut back to the accepted drafts, and what
        follows is fed again by `extend`.
        """
        position = len(trunk.tokens) + accepted  # of the bonus token
        branch = self._matching(trunk, accepted, bonus, speculation)
        trunk.tokens += [*trunk.speculation[:accepted], bonus]
        trunk.speculation = list(speculation)
        if branch is None:
            trunk.valid = min(trunk.valid, position)
            trunk.hidden = None
            self.drop_branches(trunk)
            return False
        tree = trunk.tree
        assert tree is not None
        # KV of the bonus token and of all but the last draft was written by the branch's own steps.
        fed = min(tree.depth, len(speculation) + 1)
        trunk.valid = position + fed
        trunk.hidden = torch.stack([states[branch.row] for states in tree.hidden[:fed]])
        self.pool.give(trunk.blocks[branch.first :])
        trunk.blocks = trunk.blocks[: branch.first] + branch.blocks
        trunk.branches.remove(branch)
        self.drop_branches(trunk)
        return True

    def _place(self, chosen: list[tuple[Trunk, list[tuple[int, int]]]]) -> None:
        """Give the chosen outcomes their branches: the likeliest of every trunk first, as far as there are blocks."""
        steps = self.num_speculative_tokens
        for trunk, _ in chosen:
            self.drop_branches(trunk)
        for rank in range(max(len(predicted) for _, predicted in chosen)):
            for trunk, predicted in chosen:
                if rank >= len(predicted):
                    continue
                accepted, bonus = predicted[rank]
                position = len(trunk.tokens) + accepted
                if position + steps > self.model.max_length:
                    continue
                span = branch_span(position, steps, self.model.block_size)
                own = self.pool.take(span.count)
                if own is None:
                    return
                trunk.branches.append(Branch(accepted, bonus, span.first, own))

    def _matching(self, trunk: Trunk, accepted: int, bonus: int, speculation: list[int]) -> Branch | None:
        tree = trunk.tree
        if tree is None or tree.depth == 0 or len(speculation) > tree.depth:
            return None
        for branch in trunk.branches:
            if (branch.accepted, branch.bonus) == (accepted, bonus):
                drafted = [int(step[branch.row]) for step in tree.drafts[: len(speculation)]]
                return branch if drafted == speculation else None
        return None

    def drop_branches(self, trunk: Trunk) -> None:
        """Give up the branches of a trunk. Only while no tree that they are in is growing."""
        for branch in trunk.branches:
            self.pool.give(branch.blocks)
        trunk.branches, trunk.tree = [], None

    def _choose(self, trunks: list[Trunk], branches: int) -> list[tuple[Trunk, list[tuple[int, int]]]]:
        """The outcomes (k, t*) to draft for of each trunk, likeliest first."""
        widest = max(len(t.speculation) for t in trunks)
        counts = [len(t.speculation) + 1 for t in trunks]
        states = torch.cat([t.hidden for t in trunks if t.hidden is not None])
        flat = self.model.logits(states)
        if all(count == widest + 1 for count in counts):
            logits = flat.view(len(trunks), widest + 1, -1)
        else:
            logits = flat.new_zeros(len(trunks), widest + 1, flat.shape[-1])
            for row, part in zip(logits, flat.split(counts), strict=True):
                row[: part.shape[0]] = part
        device = flat.device
        drafts = torch.zeros(len(trunks), widest, dtype=torch.int64, device=device)
        for line, trunk in zip(drafts, trunks, strict=True):
            line[: len(trunk.speculation)] = torch.tensor(trunk.speculation, dtype=torch.int64, device=device)
        found = outcomes.choose(
            self.fan_out,
            logits,
            drafts,
            torch.tensor([len(t.speculation) for t in trunks], device=device),
            torch.tensor([t.temperature for t in trunks], dtype=torch.float32, device=device),
            branches,
        )
        order = found.probability.argsort(dim=1, descending=True, stable=True)
        accepted, bonus = found.accepted.gather(1, order).tolist(), found.bonus.gather(1, order).tolist()
        return [
            # Where fewer outcomes are possible than asked for, the rest is marked and has no token.
            (trunk, [(k, token) for k, token in zip(*pair, strict=True) if token != outcomes.NO_TOKEN])
            for trunk, *pair in zip(trunks, accepted, bonus, strict=True)
        ]
