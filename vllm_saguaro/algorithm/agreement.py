"""Verification where every token of the target is decided before drafts are looked at: a draft is accepted if it is it.

For noise g that depends on the request and the position alone, argmax_t (log p_t + g_t) is an exact draw from p,
whatever was drafted; so is the likeliest token of a greedy request. Then the text is that without drafts, token by
token, and drafts decide only how many tokens come at once.

Shapes: B requests, K drafts at most, L rows of logits, those of a request one after the other: one for the last token
of its text, and one for each draft. Static, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def agreed(
    drawn: Tensor, drafts: Tensor, begins: Tensor, places: Tensor, num_speculative_tokens: int
) -> tuple[Tensor, Tensor]:
    """(tokens [B, K + 1] int64, how many of them count [B] int32): the accepted drafts, and the token after them.

    drawn   [L] int64  the target's token after each row
    drafts  [L] int64  the draft that a row was fed, at places 1 .. K; negative: it must not be accepted
    begins  [B + 1]    the rows of request b are begins[b] .. begins[b + 1] - 1
    places  [L]        0 for the row of a request's last token, i for that of its i-th draft
    """
    batch, rows = begins.shape[0] - 1, torch.arange(drawn.shape[0], device=drawn.device)
    request = torch.searchsorted(begins[1:].contiguous(), rows.to(begins.dtype), right=True)
    at = request, places.long()
    tokens = drawn.new_zeros(batch, num_speculative_tokens + 1, dtype=torch.int64)
    tokens[at] = drawn.long()
    fed = torch.full_like(tokens, -1)  # where there is no row there is no draft
    fed[at] = drafts.long()
    same = (fed[:, 1:] == tokens[:, :-1]) & (fed[:, 1:] >= 0)
    return tokens, 1 + same.cumprod(1, dtype=torch.int32).sum(1, dtype=torch.int32)
