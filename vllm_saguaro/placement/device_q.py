"""q of handed-over drafts as vLLM's Model Runner V2 wants it: logits before temperature, over the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vllm_saguaro.messages import GREEDY_BELOW

_TOLERANCE = 1e-4
"""As in `distribution.py`."""


def is_sound(tokens: Tensor, probabilities: Tensor, vocab_size: int) -> Tensor:
    """Whether each row [..., M] is a distribution over different tokens of the vocabulary [...] bool.

    Entries of probability 0 may have any token.
    """
    used = probabilities > 0  # false where it is no number
    possible = ((probabilities >= 0) & (probabilities <= 1 + _TOLERANCE)).all(-1)
    sums = (probabilities.sum(-1) - 1).abs() <= _TOLERANCE
    known = (~used | ((tokens >= 0) & (tokens < vocab_size))).all(-1)
    # Unused entries become negative numbers, each another one.
    others = torch.arange(-tokens.shape[-1], 0, device=tokens.device)
    ordered = torch.where(used, tokens, others).sort(-1).values
    different = (ordered[..., 1:] != ordered[..., :-1]).all(-1)
    return possible & sums & known & different


class LogitsWriter:
    """Writes q into `draft_logits` [R, K, V] by slot, and takes back no more than was written there before.

    A row is -inf but for M tokens at most. To fill it anew each step would write the whole vocabulary (131 MB at B =
    64, K = 4, V = 128k) for the sake of those few. So nobody else may write into the tensor. Enqueues only, and always
    the same but for the first step of a slot.
    """

    def __init__(self, slots: int, depths: int, support: int, device: torch.device) -> None:
        """`slots` R, `depths` K, `support` M: candidates of a q, at most."""
        self._into: Tensor | None = None
        self._written = torch.zeros(slots, depths, support, dtype=torch.int64, device=device)
        """The tokens of each row that may not be -inf."""
        self._known: np.ndarray = np.zeros(slots, dtype=bool)
        """On the host: the slots whose rows are ours, -inf but for what we wrote."""
        self._depth = torch.arange(depths, device=device).view(1, -1, 1)
        # On the device: a number of the host's would be copied at each write, and waited for
        self._nothing = torch.full((), -math.inf, device=device)
        self.resident_bytes = self._written.nbytes

    def write(
        self,
        draft_logits: Tensor,
        slots: Tensor,
        slots_on_host: np.ndarray,
        drafts: Tensor,
        temperature: Tensor,
        tokens: Tensor,
        probabilities: Tensor,
        told: Tensor,
    ) -> None:
        """Rows `slots` of `draft_logits` become T * log q of `drafts` [B, K], so that softmax(row / T) is q.

        q is `probabilities` [B, K, M] of `tokens` [B, K, M] int64 where `told` [B, K] says that it is theirs, and where
        it is sound and the draft could have been drawn from it. Otherwise the draft counts as certain: 0 at its token,
        -inf elsewhere. That is as exact: whatever a draft x was drawn from, as long as not with the verifier's own
        coin, to accept it with p(x) and else to draw from p without x gives p. It is only accepted less often.
        """
        chosen = drafts.unsqueeze(-1)
        used = probabilities > 0
        of_draft = torch.where(used & (tokens == chosen), probabilities, 0.0).sum(-1)
        sampled = told & (temperature >= GREEDY_BELOW).unsqueeze(1) & (of_draft > 0)
        sampled &= is_sound(tokens, probabilities, draft_logits.shape[-1])
        scale = temperature[:, None, None]
        own = torch.where(sampled, scale.squeeze(-1) * of_draft.log(), 0.0).unsqueeze(-1)
        # All entries without a probability write the draft's own value at its own place: which comes last is all one.
        written = sampled.unsqueeze(-1) & used
        at = torch.where(written, tokens, chosen)
        self._put(draft_logits, slots, slots_on_host, at, torch.where(written, scale * probabilities.log(), own))

    def write_certain(self, draft_logits: Tensor, slots: Tensor, slots_on_host: np.ndarray, drafts: Tensor) -> None:
        """Rows `slots` of `draft_logits` become 0 at `drafts` [B, K] and -inf elsewhere."""
        at = drafts.unsqueeze(-1).expand(-1, -1, self._written.shape[-1])
        self._put(draft_logits, slots, slots_on_host, at, torch.zeros_like(at, dtype=draft_logits.dtype))

    def _put(self, draft_logits: Tensor, slots: Tensor, slots_on_host: np.ndarray, at: Tensor, values: Tensor) -> None:
        """-inf but for `values` [B, K, M] at the tokens `at` [B, K, M]."""
        if self._into is not draft_logits:
            self._into = draft_logits
            self._known[:] = False
        if not self._known[slots_on_host].all():
            draft_logits.index_fill_(0, slots, -math.inf)
            self._known[slots_on_host] = True
        rows = slots.view(-1, 1, 1)
        draft_logits[rows, self._depth, self._written[slots]] = self._nothing.to(draft_logits.dtype)
        draft_logits[rows, self._depth, at] = values.to(draft_logits.dtype)
        self._written[slots] = at
