"""The draft engine: a request's text and KV, its branches, and the four things that happen to them.

`extend` brings the KV up to date (prefill and glue are the same thing), `fork` chooses the likeliest outcomes and gives
each a branch, `grow` decodes one more token for all branches at once, and `settle` turns a request to its real outcome:
on a hit the branch's blocks become the request's own (no KV is copied), on a miss the text is cut back.

Invariant of a `Trunk`: KV is right for positions 0 .. valid - 1 of committed text plus drafts under verification, and
`hidden` holds the hidden states of positions len(tokens) - 1 .. valid - 1, from which outcomes are predicted.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.drawing import Drawer
from vllm_saguaro.drafting.forecast import Forecaster
from vllm_saguaro.drafting.kv import BlockPool, Blocks, blocks_for, branch_span, pad_blocks
from vllm_saguaro.drafting.model import Batch, DraftModel
from vllm_saguaro.drafting.pace import Pace
from vllm_saguaro.drafting.trunk import PLAIN, Branch, Deflation, Drawing, Tree, Trunk, noise_of
from vllm_saguaro.messages import Proposals, Sampling


class DraftEngine:
    """Trunks and branches over one `DraftModel`. Knows nothing of rounds, stamps or transports."""

    def __init__(
        self,
        model: DraftModel,
        num_speculative_tokens: int,
        branches: int,
        fan_out: str = "ranked",
        method: str = "coupled",
        seed: int | None = None,
        pace: Pace | None = None,
        deflations: Deflations | None = None,
        pool: Blocks | None = None,
    ) -> None:
        """`branches`: N, at most. `fan_out`: see `outcomes.FanOut`. `method` and `seed`: see `Drawer`.

        Without a `pace` N is always `branches`; without `deflations` C is 1; without a `pool` all blocks of the model
        are this engine's.
        """
        self.model = model
        self.num_speculative_tokens = num_speculative_tokens
        self.branches = branches
        self.pool: Blocks = pool or BlockPool(model.num_blocks)
        self.drawer = Drawer(method, model, seed)
        self.forecaster = Forecaster(fan_out)
        self.pace = pace or Pace(num_speculative_tokens, branches, chooses=False)
        self.deflations = deflations or Deflations(num_speculative_tokens, c=1.0)
        self._wanted = branches

    # ---- text and KV -------------------------------------------------------------------------------------------

    def admit(self, tokens: list[int], sampling: Sampling) -> Trunk:
        """A request with this text; its KV comes with `extend`."""
        return Trunk(tokens, sampling, noise_of(sampling))

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
        states = torch.cat([t.hidden for t in trunks if t.hidden is not None])
        certain = [self.drawer.kind(trunk.sampling) is Drawing.CERTAIN for trunk in trunks]
        wanted = self._wanted = branches or self.branches
        predicted = self.forecaster.predict(trunks, self.model.logits(states), self.branches, certain, wanted)
        self._place([(t, ranked[:wanted]) for t, ranked in zip(trunks, predicted, strict=True)])
        return self._plant(trunks, self.num_speculative_tokens)

    @torch.inference_mode()
    def pursue(self, wanted: list[tuple[Trunk, int, int]], depth: int) -> Tree | None:
        """Branches for outcomes (k, t*) that are known already: one for each trunk, `depth` tokens deep.

        What a tree has of them is gone on with, if it has all of them. The KV of a trunk must reach up to its accepted
        drafts. None when no branch found room.
        """
        trunks = [trunk for trunk, _, _ in wanted]
        found = [trunk.branch_of(accepted, bonus) for trunk, accepted, bonus in wanted]
        tree = trunks[0].tree
        if tree is not None and tree.depth and all(t.tree is tree for t in trunks) and None not in found:
            branches = [branch for branch in found if branch is not None]
            tree = tree.take([branch.row for branch in branches])
            for row, (trunk, branch) in enumerate(zip(trunks, branches, strict=True)):
                self._give_up(trunk, keep=branch)
                branch.row, trunk.tree = row, tree
            tree.depth_limit = min(max(tree.depth, depth), self.num_speculative_tokens)
            return tree
        self._place([(trunk, [(accepted, bonus)]) for trunk, accepted, bonus in wanted])
        return self._plant(trunks, min(depth, self.num_speculative_tokens))

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
        if tree.rule.all_certain:
            tree.next_ids = self.model.greedy(hidden)
            tree.q.append(None)
        else:
            tree.next_ids, q = self.drawer.draw(self.model.logits(hidden), tree.rule, tree.depth)
            tree.q.append(q)
        tree.hidden.append(hidden)
        tree.drafts.append(tree.next_ids)

    def drafts_of(self, trunk: Trunk) -> list[np.ndarray]:
        """The tokens drafted so far: one array a depth, over the branches of the trunk."""
        if trunk.tree is None:
            return []
        rows = _rows_of(trunk)
        return [step[rows] for step in trunk.tree.drafts]

    def q_of(self, trunk: Trunk, depth: int) -> Proposals | None:
        """What the tokens of the trunk's branches at this depth were drawn from; None where they are certain."""
        tree = trunk.tree
        if tree is None or self.drawer.kind(trunk.sampling) is not Drawing.SAMPLED:
            return None
        q, rows = tree.q[depth], _rows_of(trunk)
        assert q is not None
        return Proposals(q.tokens[rows].to(torch.int32).cpu().numpy(), q.q[rows].cpu().numpy())

    @torch.inference_mode()
    def settle(
        self, trunk: Trunk, accepted: int, bonus: int, speculation: list[int], verified: int | None = None
    ) -> bool:
        """Turn a trunk to its real outcome; `speculation` is what goes into verification next. True on adoption.

        `verified`: how many of the drafts were in the pass (None: all). The forecast learns from them.

        A branch is adopted when it predicted (accepted, bonus) and its drafts begin with `speculation` (they do, unless
        the target side got its drafts elsewhere). Otherwise the text is cut back to the accepted drafts, and what
        follows is fed again by `extend`.
        """
        position = len(trunk.tokens) + accepted  # of the bonus token
        if trunk.forecast is not None:
            verified = len(trunk.speculation) if verified is None else verified
            rank = self.forecaster.learn(trunk.forecast, accepted, bonus, verified)
            judged = accepted < verified or verified == len(trunk.speculation)  # else the scheduler cut it short
            if judged:
                self.pace.observe_forecast(rank, accepted, verified)
            sampled = bool(trunk.speculation) and self.drawer.kind(trunk.sampling) is Drawing.SAMPLED
            if judged and sampled and not trunk.backup:
                hit = rank is not None and rank < trunk.forecast.wanted
                self.deflations.learn(trunk.deflation.c, accepted, verified, hit)
            trunk.forecast = None
        branch = self._matching(trunk, accepted, bonus, speculation)
        trunk.tokens += [*trunk.speculation[:accepted], bonus]
        trunk.speculation = list(speculation)
        if trunk.noise is not None:
            trunk.noise.forget(len(trunk.tokens) - trunk.sampling.prompt_length)
        trunk.backup, trunk.deflation = branch is None and bool(speculation), PLAIN
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
        if self.drawer.kind(trunk.sampling) is Drawing.SAMPLED:
            trunk.deflation = tree.rule.deflation
        trunk.hidden = torch.stack([states[branch.row] for states in tree.hidden[:fed]])
        self.pool.give(trunk.blocks[branch.first :])
        trunk.blocks = trunk.blocks[: branch.first] + branch.blocks
        self._give_up(trunk, keep=branch)
        trunk.branches, trunk.tree = [], None
        return True

    def _plant(self, trunks: list[Trunk], steps: int) -> Tree | None:
        """The tree of all branches of these trunks, each with a copy of the block that it begins in."""
        block_size = self.model.block_size
        source: list[int] = []
        destination: list[int] = []
        rows: list[list[int]] = []
        owners: list[tuple[Trunk, int]] = []
        for trunk in trunks:
            for branch in trunk.branches:
                branch.row = len(rows)
                position = len(trunk.tokens) + branch.accepted
                if branch_span(position, steps, block_size).copies:
                    source.append(trunk.blocks[branch.first])
                    destination.append(branch.blocks[0])
                rows.append(trunk.blocks[: branch.first] + branch.blocks)
                owners.append((trunk, position))
        if not rows:
            return None
        if source:
            self.model.copy_blocks(source, destination)
        tree = Tree(
            next_ids=np.array([b.bonus for t in trunks for b in t.branches], dtype=np.int64),
            start=np.array([position for _, position in owners], dtype=np.int64),
            blocks=pad_blocks(rows),
            depth_limit=steps,
            rule=self.drawer.rule(owners, self.num_speculative_tokens, self._deflation(trunks)),
        )
        for trunk in trunks:
            trunk.tree = tree if trunk.branches else None
        return tree

    def _deflation(self, trunks: list[Trunk]) -> Deflation:
        """How the next tree's sampled rows draw."""
        if not any(self.drawer.kind(trunk.sampling) is Drawing.SAMPLED for trunk in trunks):
            return PLAIN
        # F of these drafts' positions is that of the round which verifies them: about that of this one.
        return self.deflations.next(self.pace.accepted_lengths(), self._wanted, self.pace.round_time)

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
        branch = trunk.branch_of(accepted, bonus)
        if branch is None:
            return None
        drafted = [int(step[branch.row]) for step in tree.drafts[: len(speculation)]]
        return branch if drafted == speculation else None

    def drop_branches(self, trunk: Trunk) -> None:
        """Give up the branches of a trunk. Only while no tree that they are in is growing."""
        self._give_up(trunk)
        trunk.tree = None

    def _give_up(self, trunk: Trunk, keep: Branch | None = None) -> None:
        for branch in trunk.branches:
            if branch is not keep:
                self.pool.give(branch.blocks)
        trunk.branches = [] if keep is None else [keep]


def _rows_of(trunk: Trunk) -> slice:
    """The rows of a trunk's branches in its tree: they are numbered in a row."""
    return slice(trunk.branches[0].row, trunk.branches[-1].row + 1)
