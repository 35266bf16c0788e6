"""`algorithm.outcome_lookup` as a Triton kernel. No GPU has run it yet: it runs interpreted, and compiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def outcome_lookup(
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(branch [B], tokens [B, K], ready [B]): see the twin.

    Grid: one program (a warp) a row. It reads 12 N + 8 K bytes and writes 8 K + 12: the time of a launch, some 3 us.
    """
    rows = slots.shape[0]
    branches, num_drafts = drafts.shape[1:]
    branch = torch.empty(rows, dtype=torch.int64, device=slots.device)
    tokens = torch.empty(rows, num_drafts, dtype=torch.int64, device=slots.device)
    ready = torch.empty(rows, dtype=torch.int32, device=slots.device)
    if rows:
        _lookup[(rows,)](
            accepted_keys,
            *accepted_keys.stride(),
            bonus_keys,
            *bonus_keys.stride(),
            drafts,
            *drafts.stride(),
            depth,
            depth.stride(0),
            slots,
            slots.stride(0),
            accepted,
            accepted.stride(0),
            bonus,
            bonus.stride(0),
            branch,
            tokens,
            ready,
            branches,
            num_drafts,
            BLOCK_N=triton.next_power_of_2(branches),
            BLOCK_K=triton.next_power_of_2(num_drafts),
            num_warps=1,
        )
    return branch, tokens, ready


@triton.jit
def _lookup(  # type: ignore[no-untyped-def]
    accepted_keys,
    accepted_keys_slot,
    accepted_keys_branch,
    bonus_keys,
    bonus_keys_slot,
    bonus_keys_branch,
    drafts,
    drafts_slot,
    drafts_branch,
    drafts_position,
    depth,
    depth_slot,
    slots,
    slots_row,
    accepted,
    accepted_row,
    bonus,
    bonus_row,
    branch,
    tokens,
    ready,
    branches,
    num_drafts,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    k = tl.load(accepted + row * accepted_row)
    token = tl.load(bonus + row * bonus_row)

    n = tl.arange(0, BLOCK_N)
    keys = tl.load(accepted_keys + slot * accepted_keys_slot + n * accepted_keys_branch, mask=n < branches, other=-1)
    last = tl.load(bonus_keys + slot * bonus_keys_slot + n * bonus_keys_branch, mask=n < branches, other=-1)
    same = (keys >= 0) & (keys == k) & (last == token)
    first = tl.min(tl.where(same, n, branches), 0)
    hit = first < branches

    given = tl.where(hit, tl.load(depth + slot * depth_slot), 0)
    j = tl.arange(0, BLOCK_K)
    at = drafts + slot * drafts_slot + tl.where(hit, first, 0).to(tl.int64) * drafts_branch
    found = tl.load(at + j * drafts_position, mask=j < tl.minimum(given, num_drafts), other=0)
    tl.store(tokens + row * num_drafts + j, tl.where(j < given, found, token), mask=j < num_drafts)
    tl.store(branch + row, tl.where(hit, first, -1).to(tl.int64))
    tl.store(ready + row, given)
