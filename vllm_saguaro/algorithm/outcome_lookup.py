"""Whether what the target found was drafted for, and the drafts of that outcome, without the host.

Shapes: R slots, N branches a slot, K drafts a branch; B rows of the step, row b speaks of slot `slots[b]`. Every shape
depends on the shapes of the arguments alone and nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MISS = -1
"""The branch of a row whose outcome was not drafted for."""


def outcome_lookup(
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(branch [B] int64, tokens [B, K] int64, ready [B] int32): each row's outcome among those of its slot.

    accepted_keys  [R, N] int32     k of each branch; negative: no branch, which no outcome ever matches
    bonus_keys     [R, N] int64     t* of each branch
    drafts         [R, N, K] int64  what was drafted after each branch's outcome
    depth          [R] int32        how many of those K are there, 0 .. K
    slots          [B] int64        in 0 .. R - 1; a slot may come more than once
    accepted       [B] int32        k; negative: the row got no token, a miss
    bonus          [B] int64        t*, a token of the vocabulary

    `branch` is the first that has the row's (k, t*), MISS where none has. `ready` is the slot's depth on a hit and 0 on
    a miss; `tokens` beyond it are `bonus`, so that every entry is a token of the vocabulary.
    """
    branches, num_drafts = drafts.shape[1:]
    keys = accepted_keys[slots]
    same = (keys >= 0) & (keys == accepted.unsqueeze(1)) & (bonus_keys[slots] == bonus.unsqueeze(1))
    order = torch.arange(branches, device=slots.device)
    first = torch.where(same, order, branches).amin(1)
    hit = first < branches
    ready = torch.where(hit, depth[slots], 0)
    found = drafts[slots, first.clamp_max(branches - 1)]
    given = torch.arange(num_drafts, device=slots.device) < ready.unsqueeze(1)
    return torch.where(hit, first, MISS), torch.where(given, found, bonus.unsqueeze(1)), ready
