"""One round on the device: look the outcomes up; then adopt, glue, predict, fork, and K steps of all branches.

Every operation has static shapes and waits for nothing, so that a CUDA graph can hold a `look_up` or a `work`. What
they read and write are buffers that never move: the outcomes and results of a step here, all that outlasts a step in
`SlotState`. Rows that are padding, have no token, or whose text the draft has not read work in the row of `SlotState`
that is no slot, and write KV nowhere.

Invariant: when a round begins, the KV of an active row is right for all positions before its bonus token; after a hit
also for the bonus token and all drafts but the last, since the branch wrote them into blocks that are the request's
from then on. So each round feeds exactly one token: the last draft after a hit, the bonus token after a miss.

Shapes: B rows of a bucket, N branches, K drafts, M candidates, H hidden size, X = B * N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.algorithm.outcomes import geometric_fan_out
from vllm_saguaro.algorithm.position_noise import stems
from vllm_saguaro.algorithm.sampling import SamplingRows, candidates
from vllm_saguaro.drafting.buckets import Bucket
from vllm_saguaro.drafting.device_coupling import believed, pick
from vllm_saguaro.drafting.device_drawing import Rule, draw, seeds
from vllm_saguaro.drafting.device_maps import AcceptanceMaps
from vllm_saguaro.drafting.device_model import NO_PLACE, DecodeRows, DeviceModel
from vllm_saguaro.drafting.slot_state import SlotState
from vllm_saguaro.kernels.operations import Operations

LOGITS_ROWS = 256
"""Rows of the LM head at a time: logits of many rows and a large vocabulary are what takes the most memory."""


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What one step of the target brings, and what is found for it. B: the largest batch.

    In: slots [B] int64, accepted and verified [B] int32, bonus [B] int64, lengths [B] int32, as in `DeviceOutcomes`.
    Out: tokens [B, K] int64 and ready [B] int32, as in `DeviceDrafts`; q_tokens [B, K, M] int64 and log_q [B, K, M]
    float32, what the tokens were drawn from: certain ones and filler have log q = 0 at the token.
    Kept for the round: branch [B] int64, the one that was hit, or -1; speculation [B, K] int64, its drafts.
    """

    slots: Tensor
    accepted: Tensor
    verified: Tensor
    bonus: Tensor
    lengths: Tensor
    tokens: Tensor
    ready: Tensor
    q_tokens: Tensor
    log_q: Tensor
    branch: Tensor
    speculation: Tensor

    @classmethod
    def empty(cls, state: SlotState, batch: int) -> StepBuffers:
        """No row has a token."""
        device, (_, _, k, m) = state.main.device, state.q_tokens.shape

        def filled(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((batch, *shape), value, dtype=dtype, device=device)

        return cls(
            slots=filled(value=state.nobody),
            accepted=filled(value=-1, dtype=torch.int32),
            verified=filled(dtype=torch.int32),
            bonus=filled(),
            lengths=filled(dtype=torch.int32),
            tokens=filled(k),
            ready=filled(dtype=torch.int32),
            q_tokens=filled(k, m),
            log_q=filled(k, m, dtype=torch.float32),
            branch=filled(value=-1),
            speculation=filled(k),
        )

    @property
    def resident_bytes(self) -> int:
        """What the buffers take on the device."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)


class DeviceRound:
    """The static part of the engine. Nothing here is decided by the host but the bucket."""

    def __init__(
        self,
        model: DeviceModel,
        operations: Operations,
        state: SlotState,
        batch: int,
        secret: int,
        sampling_c: float = 1.0,
        coupled: bool = False,
    ) -> None:
        """`batch`: rows of the largest step. `secret`: 63 bits that the drafts' noise comes from. `coupled`: the
        target's noise picks the drafts of all rows that have it, and the others are certain; nobody asks for a q.
        """
        self.model, self.state = model, state
        self.step = StepBuffers.empty(state, batch)
        self.maps = AcceptanceMaps(model.device)
        self._do, self._secret, self._c, self._coupled = operations, secret, sampling_c, coupled
        self._num_drafts = state.drafts.shape[2]
        self._rows: dict[Bucket, tuple[DecodeRows, DecodeRows]] = {}

    @property
    def resident_bytes(self) -> int:
        """State, step buffers, maps, and the rows of all buckets so far."""
        each = [rows for pair in self._rows.values() for rows in pair]
        rows = [tensor for r in each for tensor in (r.tables, r.input_ids, r.positions, r.lengths, r.slot_mapping)]
        held = self.state.resident_bytes + self.step.resident_bytes + self.maps.resident_bytes
        return held + sum(tensor.nbytes for tensor in rows)

    def rows(self, bucket: Bucket) -> tuple[DecodeRows, DecodeRows]:
        """The buffers of a bucket's glue forward and of its branch steps; made where they are not there yet."""
        if bucket not in self._rows:
            width, device = self.state.main.shape[1], self.model.device
            glue, branches = (DecodeRows.empty(count, width, device) for count in (bucket.batch, bucket.rows))
            self._rows[bucket] = glue, branches
        return self._rows[bucket]

    # ---- look up -----------------------------------------------------------------------------------------------

    def look_up(self, bucket: Bucket) -> None:
        """Find the drafts of the outcomes in `step`, and take in what the outcomes say of the texts."""
        state, step, size = self.state, self.step, bucket.batch
        self._do.settle_outcomes(
            *(state.alive, state.ready, state.length, state.admitted, state.tail),
            *(state.accepted_keys, state.bonus_keys, state.drafts, state.depth),
            *(step.slots[:size], step.accepted[:size], step.bonus[:size], step.lengths[:size]),
            *(self.model.max_length, self.model.vocab_size),
            *(step.branch[:size], step.speculation[:size], step.tokens[:size], step.ready[:size]),
        )
        if self._coupled:
            return
        branch = step.branch[:size]
        known = (branch >= 0).view(-1, 1, 1)
        found = step.slots[:size], branch.clamp_min(0)
        step.q_tokens[:size] = torch.where(known, state.q_tokens[found].long(), step.tokens[:size].unsqueeze(-1))
        step.log_q[:size] = torch.where(known, state.log_q[found], 0.0)

    # ---- the round ---------------------------------------------------------------------------------------------

    def work(self, bucket: Bucket) -> None:
        """From the outcomes that were looked up to the next table, of all rows of the bucket at once."""
        state, step, size = self.state, self.step, bucket.batch
        slots, accepted, lengths = step.slots[:size], step.accepted[:size], step.lengths[:size]
        active = (accepted >= 0) & state.alive[slots] & state.ready[slots]
        at = torch.where(active, slots, state.nobody)
        branch = torch.where(active, step.branch[:size], -1)
        hit = branch >= 0
        under = torch.where(hit, self._num_drafts, 0).to(torch.int32)
        self._learn(at, accepted, step.verified[:size], active)
        # A branch begins with the bonus token that it predicted, which is the last token of the text now.
        first = torch.div((lengths - 1).clamp_min(0), self.model.block_size, rounding_mode="floor").long()
        self._do.adopt(state.main, state.private, at, branch, first)

        states = self._glue(bucket, at, active, branch)
        rule = self._rule(at)
        tokens, q = self._beliefs(states, rule, lengths)
        speculation = step.speculation[:size]
        is_draft = tokens[:, :-1] == speculation.unsqueeze(-1)
        # What a model says of a row that is nobody's may be no number, and must not be learnt from.
        raw = torch.where(is_draft & active.view(-1, 1, 1), q[:, :-1], 0.0).sum(-1).nan_to_num()
        # The last draft of a branch must have its place too, when it is glued.
        room = self.model.max_length - self._num_drafts - lengths
        room = torch.where(active, room.clamp_min(0), 0).to(torch.int32)
        accept = self.maps.probability(state.cls[at], raw)
        k, bonus, _ = self._do.ranked_outcomes(tokens, q.log(), speculation, under, accept, bucket.branches, room)
        own = torch.arange(bucket.branches, device=at.device) < state.branches[at].unsqueeze(1)
        k = torch.where(own, k, -1)
        self._grow(bucket, at, rule, k, bonus)

        keys = torch.nn.functional.pad(k, (0, state.accepted_keys.shape[1] - bucket.branches), value=-1)
        state.accepted_keys[at] = keys
        state.bonus_keys[at, : bucket.branches] = bonus
        state.depth.index_fill_(0, at, self._num_drafts)  # `[at] =` a number would copy it from the host, and wait
        state.under[at] = under
        state.raw[at] = raw
        state.rounds[at] = state.rounds[at] + 1

    def _learn(self, at: Tensor, accepted: Tensor, verified: Tensor, active: Tensor) -> None:
        """What became of the drafts that were under verification, as far as the pass went."""
        j = torch.arange(self._num_drafts, device=at.device)
        judged = j < torch.minimum(accepted + 1, torch.minimum(self.state.under[at], verified)).unsqueeze(1)
        counts = judged & active.unsqueeze(1)
        self.maps.learn(self.state.cls[at], self.state.raw[at], j < accepted.unsqueeze(1), counts)

    def _glue(self, bucket: Bucket, at: Tensor, active: Tensor, branch: Tensor) -> Tensor:
        """Feed the one token whose KV is missing; the K + 1 states [B, K + 1, H] that outcomes are predicted from.

        After a miss only the first of them means anything.
        """
        state, step, size = self.state, self.step, bucket.batch
        rows, block_size = self.rows(bucket)[0], self.model.block_size
        hit = branch >= 0
        token = torch.where(hit, step.speculation[:size, -1], step.bonus[:size])
        position = self._glued_position(step.lengths[:size].long(), hit)
        position = torch.where(active, position, 0)
        tables = state.main[at]
        block = tables.gather(1, torch.div(position, block_size, rounding_mode="floor").unsqueeze(1)).squeeze(1)
        rows.input_ids.copy_(torch.where(active, token, 0))
        rows.positions.copy_(position)
        rows.lengths.copy_(position + 1)
        rows.tables.copy_(tables)
        place = block.long() * block_size + position % block_size
        rows.slot_mapping.copy_(torch.where(active, place, NO_PLACE))
        last = self.model.decode(rows).unsqueeze(1)
        kept = state.hidden[at, branch.clamp_min(0)]
        return torch.cat((torch.where(hit.view(-1, 1, 1), kept, last), last), dim=1)

    def _glued_position(self, lengths: Tensor, hit: Tensor) -> Tensor:
        """Where the token that is fed stands: the last draft after a hit, the bonus token after a miss."""
        return lengths - 1 + torch.where(hit, self._num_drafts, 0)

    def _rule(self, at: Tensor) -> Rule:
        """How the rows of these slots draw."""
        state = self.state
        sampling = (state.temperature[at], state.top_k[at], state.top_p[at], state.min_p[at])
        # Top-p counts the mass of the candidates alone: a pass over all logits saved, and a few tokens more at most.
        rows = SamplingRows(*sampling, nucleus=False, cut=True)
        return Rule(rows, state.certain[at], state.noisy[at], state.seed[at], self._c)

    def _beliefs(self, states: Tensor, rule: Rule, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates [B, K + 1, M] int64 after each state [B, K + 1, H], and how likely each is, float32.

        lengths [B]: of the texts, so that the token after j accepted drafts stands at `lengths` + j.
        """
        batch, positions, _ = states.shape
        rows, flat = rule.repeat(positions), states.flatten(0, 1)
        place = (lengths.long().unsqueeze(1) + torch.arange(positions, device=lengths.device)).flatten()
        found = [
            self._candidates(self.model.logits(flat[piece]), rows.take(piece), place[piece])
            for piece in _pieces(flat.shape[0])
        ]
        shape = (batch, positions, -1)
        tokens, share = (torch.cat(parts).view(shape) for parts in zip(*found, strict=True))
        return tokens, share

    def _candidates(self, logits: Tensor, rule: Rule, place: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens [X, M] at the text positions `place` [X], and how likely each is."""
        if self._coupled:
            return believed(logits, rule, stems(rule.seed, place), self._do.add_noise)
        found = candidates(logits, rule.rows)
        return found.tokens, found.q

    def _grow(self, bucket: Bucket, at: Tensor, rule: Rule, k: Tensor, bonus: Tensor) -> None:
        """A branch for each predicted outcome (k [B, N], -1: none; bonus [B, N]), K tokens deep."""
        model, state, n = self.model, self.state, bucket.branches
        lengths, real = self.step.lengths[: bucket.batch], k >= 0
        tables, source, destination = self._do.fork(state.main, state.private[:, :n], at, lengths, k, model.block_size)
        for pages in model.pages:
            self._do.copy_blocks(pages, source, destination)
        rows, rules = self.rows(bucket)[1], rule.repeat(n)
        rows.tables.copy_(tables)
        # One before the first: a step moves on and then feeds.
        rows.positions.copy_(torch.where(real, lengths.unsqueeze(1) + k - 1, -1).flatten())
        token = torch.where(real, bonus, 0).flatten()
        shape = (bucket.batch, n)
        for depth in range(self._num_drafts):
            self._do.branch_step(
                *(token, rows.positions, rows.tables, model.block_size, model.max_length),
                *(rows.input_ids, rows.lengths, rows.slot_mapping),
            )
            hidden = model.decode(rows)
            state.hidden[at, :n, depth] = hidden.view(*shape, -1)
            draw = self._pick if self._coupled else self._draw
            token = draw(hidden, rules, at, (lengths.unsqueeze(1) + k).long().flatten(), depth)
            state.drafts[at, :n, depth] = token.view(shape)

    def _pick(self, hidden: Tensor, rules: Rule, at: Tensor, bonus_at: Tensor, depth: int) -> Tensor:
        """The token [X] that the noise of its text position picks, after the states `hidden` [X, H].

        `bonus_at` [X]: where the bonus tokens of the branches stand; a branch that is none may have any there.
        """
        stem = stems(rules.seed, bonus_at + 1 + depth)
        return torch.cat(
            [
                pick(self.model.logits(hidden[piece]), rules.take(piece), stem[piece], self._do.add_noise)
                for piece in _pieces(hidden.shape[0])
            ]
        )

    def _draw(self, hidden: Tensor, rules: Rule, at: Tensor, bonus_at: Tensor, depth: int) -> Tensor:
        """The token [X] that is drawn after the states `hidden` [X, H]; what it was drawn from is kept in the table."""
        state, shape = self.state, (at.shape[0], hidden.shape[0] // at.shape[0])
        n = shape[1]
        seed = seeds(self._secret, state.admission[at], state.rounds[at], n, depth)
        fan_out = geometric_fan_out(self._num_drafts, n)[depth]
        drawn = [
            draw(self.model.logits(hidden[piece]), rules.take(piece), seed[piece], fan_out)
            for piece in _pieces(hidden.shape[0])
        ]
        state.q_tokens[at, :n, depth] = torch.cat([d.tokens for d in drawn]).view(*shape, -1).to(torch.int32)
        state.log_q[at, :n, depth] = torch.cat([d.log_q for d in drawn]).view(*shape, -1)
        return torch.cat([d.token for d in drawn])


def _pieces(rows: int) -> list[slice]:
    return [slice(begin, begin + LOGITS_ROWS) for begin in range(0, rows, LOGITS_ROWS)]
