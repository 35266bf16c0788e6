"""q of handed-over drafts as vLLM's Model Runner V2 wants it: logits before temperature, over the whole vocabulary."""

from __future__ import annotations

import math

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


def write_logits(
    draft_logits: Tensor,
    slots: Tensor,
    drafts: Tensor,
    temperature: Tensor,
    tokens: Tensor,
    probabilities: Tensor,
    told: Tensor,
) -> None:
    """Rows `slots` of `draft_logits` [R, K, V] become T * log q of `drafts` [B, K], so that softmax(row / T) is q.

    q is `probabilities` [B, K, M] of `tokens` [B, K, M] int64 where `told` [B, K] says that it is theirs, and where it
    is sound and the draft could have been drawn from it. Otherwise the draft counts as certain: 0 at its token, -inf
    elsewhere. That is as exact: whatever a draft x was drawn from, as long as not with the verifier's own coin, to
    accept it with p(x) and else to draw from p without x gives p. It is only accepted less often.
    """
    chosen = drafts.unsqueeze(-1)
    used = probabilities > 0
    of_draft = torch.where(used & (tokens == chosen), probabilities, 0.0).sum(-1)
    sampled = told & (temperature >= GREEDY_BELOW).unsqueeze(1) & (of_draft > 0)
    sampled &= is_sound(tokens, probabilities, draft_logits.shape[-1])
    scale = temperature[:, None, None]
    own = torch.where(sampled, scale.squeeze(-1) * of_draft.log(), 0.0).unsqueeze(-1)
    # All entries without a probability write the draft's own value at its own place: which of them comes last is one.
    written = sampled.unsqueeze(-1) & used
    at = torch.where(written, tokens, chosen)
    values = torch.where(written, scale * probabilities.log(), own)
    _write(draft_logits, slots, at, values)


def write_certain(draft_logits: Tensor, slots: Tensor, drafts: Tensor) -> None:
    """Rows `slots` of `draft_logits` [R, K, V] become 0 at `drafts` [B, K] and -inf elsewhere."""
    at = drafts.unsqueeze(-1)
    _write(draft_logits, slots, at, torch.zeros_like(at, dtype=draft_logits.dtype))


def _write(draft_logits: Tensor, slots: Tensor, at: Tensor, values: Tensor) -> None:
    """-inf but for `values` [B, K, n] at the tokens `at`."""
    draft_logits.index_fill_(0, slots, -math.inf)
    depth = torch.arange(at.shape[1], device=at.device)
    draft_logits[slots[:, None, None], depth[None, :, None], at] = values.to(draft_logits.dtype)
