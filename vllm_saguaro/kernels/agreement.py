"""`algorithm.agreement` as a Triton kernel. No GPU has run it yet: it runs interpreted, and compiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def agreed(
    drawn: Tensor, drafts: Tensor, begins: Tensor, places: Tensor, num_speculative_tokens: int
) -> tuple[Tensor, Tensor]:
    """(tokens [B, K + 1] int64, how many of them count [B] int32): see the twin.

    Grid: one program (a warp) a request. `places` says what the order of the rows says, and is not looked at.
    """
    batch = begins.shape[0] - 1
    tokens = torch.empty(batch, num_speculative_tokens + 1, dtype=torch.int64, device=drawn.device)
    counted = torch.empty(batch, dtype=torch.int32, device=drawn.device)
    if batch:
        _agreed[(batch,)](
            drawn,
            drawn.stride(0),
            drafts,
            drafts.stride(0),
            begins,
            begins.stride(0),
            tokens,
            counted,
            num_speculative_tokens,
            BLOCK=triton.next_power_of_2(num_speculative_tokens + 1),
            num_warps=1,
        )
    return tokens, counted


@triton.jit
def _agreed(  # type: ignore[no-untyped-def]
    drawn,
    drawn_row,
    drafts,
    drafts_row,
    begins,
    begins_request,
    tokens,
    counted,
    num_drafts,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins + request * begins_request).to(tl.int64)
    rows = tl.load(begins + (request + 1) * begins_request).to(tl.int64) - begin
    place = tl.arange(0, BLOCK)
    there = place < rows
    says = tl.load(drawn + (begin + place) * drawn_row, mask=there, other=0).to(tl.int64)
    tl.store(tokens + request * (num_drafts + 1) + place, says, mask=place <= num_drafts)
    # The draft that was fed at the place behind this one, and has to be what the target says here.
    fed = tl.load(drafts + (begin + place + 1) * drafts_row, mask=place + 1 < rows, other=-1).to(tl.int64)
    same = (fed >= 0) & (fed == says)
    # How many in front are all the same is where the first is that is not.
    tl.store(counted + request, 1 + tl.min(tl.where(same, num_drafts, tl.minimum(place, num_drafts)), 0))
