"""A `DeviceDraft` that follows a script instead of a model: it knows the answers, or makes drafts up.

All that happens is tensor operations that wait for nothing, as on a GPU; only what is recorded for the tests is read on
the host, and only where `recording` is on.

Scripts (R slots, K drafts, M candidates of a made-up q):

    none      no drafts: every row a miss
    oracle    the tokens of the reference text that continue the request, K deep
    garbage   K tokens at random
    mixed     oracle in seven rows of ten, garbage in the others
    depths    oracle, but only 0..K of the tokens are there, the others are filler
    drawn     0..K tokens drawn from a made-up q, which goes to the verifier; q of the others is nobody's
    raise     an exception

and with an error in them:

    lie       K tokens drawn, but another q is handed over than was drawn from
    stale     K tokens drawn, but the tokens are those of the slot's round before, beside the q of this one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.messages import Sampling

M = 8
ORACLE_SHARE = 0.7


class ScriptedDraft:
    """See the module's first lines."""

    resident_bytes = 0
    sampling_c: float | None = None
    branches: int | None = None

    def __init__(self, slots: int, num_speculative_tokens: int, vocab_size: int, max_length: int) -> None:
        self.script = "none"
        self.references: list[list[int]] = []
        self.candidates: Sequence[int] = range(2, 2 + M)
        """Where made-up drafts are drawn from."""
        self.recording = True
        self.events: list[tuple[str, int, str, int]] = []
        """admit and release: what, slot, request, tokens."""
        self.rounds: list[tuple[str, int, int, int, int, float, int, int]] = []
        """Request, slot, accepted, bonus, length, temperature, ready of each row of each exchange."""
        self.closed = self.captured = 0
        self.samplings: dict[str, Sampling] = {}
        self._k, self._vocab_size = num_speculative_tokens, vocab_size
        self._texts = torch.zeros(slots, max_length + num_speculative_tokens, dtype=torch.int64)
        self._former = torch.zeros(slots, num_speculative_tokens, dtype=torch.int64)
        self._rng = torch.Generator().manual_seed(7)
        self._q: tuple[Tensor, Tensor, Tensor] | None = None

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        self.events.append(("admit", slot, request_id, len(token_ids)))
        self.samplings[request_id] = sampling
        known = list(token_ids)
        self._texts[slot].zero_()
        for text in self.references:
            if text[: len(known)] == known:
                self._texts[slot, : len(text)].copy_(torch.from_numpy(np.array(text)), non_blocking=True)
                return

    def release(self, slot: int, request_id: str) -> None:
        self.events.append(("release", slot, request_id, 0))

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        if self.script == "raise":
            raise RuntimeError("the script says so")
        rows = outcomes.slots.shape[0]
        filler = outcomes.bonus.unsqueeze(-1).expand(-1, self._k)
        depth = torch.full((rows,), self._k, dtype=torch.int32)
        if self.script in ("depths", "drawn"):
            depth = torch.randint(0, self._k + 1, (rows,), generator=self._rng, dtype=torch.int32)
        if self.script == "none":
            tokens, depth = filler, torch.zeros_like(depth)
        elif self.script == "garbage":
            tokens = self._garbage(rows)
        elif self.script in ("drawn", "lie", "stale"):
            tokens = self._draw(outcomes)
        else:
            tokens = self._oracle(outcomes)
            if self.script == "mixed":
                right = torch.rand(rows, 1, generator=self._rng) < ORACLE_SHARE
                tokens = torch.where(right, tokens, self._garbage(rows))
        real = torch.arange(self._k) < depth.unsqueeze(-1)
        drafts = DeviceDrafts(torch.where(real, tokens, filler), depth)
        if self.recording:
            self._record(outcomes, depth)
        return drafts

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        if draft_logits is None:
            return
        rows = torch.full((outcomes.slots.shape[0], self._k, self._vocab_size), -torch.inf)
        certain = torch.zeros_like(rows).fill_(-torch.inf).scatter_(-1, drafts.tokens.unsqueeze(-1), 0.0)
        if self._q is None:
            draft_logits[outcomes.slots] = certain
            return
        candidates, log_q, _ = self._q
        if self.script == "lie":
            log_q = log_q.flip(-1)
        temperature = outcomes.temperature.view(-1, 1, 1)
        rows.scatter_(-1, candidates, temperature * log_q)
        real = (torch.arange(self._k) < drafts.ready.unsqueeze(-1)).unsqueeze(-1)
        # What is not real was drawn from nothing: its q is as wrong as can be, and must not be looked at.
        wrong = torch.full_like(rows, -torch.inf)
        wrong[..., 0] = 0.0
        rows = torch.where(temperature > 0, torch.where(real, rows, wrong), certain)
        draft_logits[outcomes.slots] = rows

    def capture(self) -> None:
        self.captured += 1

    def close(self) -> None:
        self.closed += 1

    def _oracle(self, outcomes: DeviceOutcomes) -> Tensor:
        self._q = None
        at = outcomes.lengths.to(torch.int64).unsqueeze(-1) + torch.arange(self._k)
        return self._texts[outcomes.slots].gather(-1, at.clamp_max(self._texts.shape[1] - 1))

    def _garbage(self, rows: int) -> Tensor:
        self._q = None
        return torch.randint(2, self._vocab_size, (rows, self._k), generator=self._rng)

    def _draw(self, outcomes: DeviceOutcomes) -> Tensor:
        """Tokens [B, K] from a q of each row and position: softmax of noise over the M candidates."""
        rows = outcomes.slots.shape[0]
        candidates = torch.tensor(list(self.candidates)).expand(rows, self._k, -1)
        log_q = (2 * torch.randn(candidates.shape, generator=self._rng)).log_softmax(-1)
        gumbel = -torch.empty(candidates.shape).exponential_(generator=self._rng).log()
        tokens = candidates.gather(-1, (log_q + gumbel).argmax(-1, keepdim=True)).squeeze(-1)
        self._q = candidates, log_q, tokens
        former = self._former[outcomes.slots]
        self._former[outcomes.slots] = tokens
        return former if self.script == "stale" else tokens

    def _record(self, outcomes: DeviceOutcomes, ready: Tensor) -> None:
        assert outcomes.slots.tolist() == outcomes.slots_on_host.tolist()
        columns: tuple[Any, ...] = (
            outcomes.request_ids,
            outcomes.slots.tolist(),
            outcomes.accepted.tolist(),
            outcomes.bonus.tolist(),
            outcomes.lengths.tolist(),
            outcomes.temperature.tolist(),
            ready.tolist(),
            outcomes.verified.tolist(),
        )
        self.rounds.extend(zip(*columns, strict=True))
