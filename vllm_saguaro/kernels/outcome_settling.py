"""`algorithm.outcome_settling` as a Triton kernel. No GPU has run it yet: it runs interpreted, and compiles."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def settle_outcomes(
    alive: Tensor,
    read: Tensor,
    length: Tensor,
    admitted: Tensor,
    tail: Tensor,
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
    lengths: Tensor,
    max_length: int,
    vocab_size: int,
    branch: Tensor,
    speculation: Tensor,
    tokens: Tensor,
    ready: Tensor,
) -> None:
    """Take in each row's outcome, and find its drafts: see the twin.

    Grid: one program (a warp) a row, each of another slot. It reads 12 N + 8 K bytes: the time of a launch, some 3 us,
    where the twin is some sixty launches between the target's sampling and its next pass.
    """
    rows = slots.shape[0]
    branches, num_drafts = drafts.shape[1:]
    if rows:
        _settle[(rows,)](
            alive,
            alive.stride(0),
            read,
            read.stride(0),
            length,
            length.stride(0),
            admitted,
            admitted.stride(0),
            tail,
            *tail.stride(),
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
            lengths,
            lengths.stride(0),
            branch,
            branch.stride(0),
            speculation,
            *speculation.stride(),
            tokens,
            *tokens.stride(),
            ready,
            ready.stride(0),
            tail.shape[1],
            branches,
            num_drafts,
            max_length,
            vocab_size,
            BLOCK_N=triton.next_power_of_2(branches),
            BLOCK_K=triton.next_power_of_2(num_drafts),
            num_warps=1,
        )


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    alive,
    alive_slot,
    read,
    read_slot,
    length,
    length_slot,
    admitted,
    admitted_slot,
    tail,
    tail_slot,
    tail_token,
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
    lengths,
    lengths_row,
    branch,
    branch_row,
    speculation,
    speculation_row,
    speculation_position,
    tokens,
    tokens_row,
    tokens_position,
    ready,
    ready_row,
    remembered,
    branches,
    num_drafts,
    max_length,
    vocab_size,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    k = tl.load(accepted + row * accepted_row)
    token = tl.load(bonus + row * bonus_row)
    now = tl.load(lengths + row * lengths_row)
    has_token = k >= 0

    agrees = (now == tl.load(length + slot * length_slot) + k + 1) & (now <= max_length)
    agrees = agrees & (token >= 0) & (token < vocab_size)
    right = (tl.load(alive + slot * alive_slot) != 0) & agrees & has_token
    is_read = tl.load(read + slot * read_slot) != 0
    behind = now - 1 - tl.load(admitted + slot * admitted_slot)
    kept = right & (k == 0) & (behind >= 0) & (behind < remembered)
    noted = kept & (is_read == 0)
    right = right & (is_read | kept)
    tl.store(alive + slot * alive_slot, right, mask=has_token)
    tl.store(length + slot * length_slot, now, mask=has_token)
    tl.store(tail + slot * tail_slot + behind.to(tl.int64) * tail_token, token, mask=noted)

    n = tl.arange(0, BLOCK_N)
    keys = tl.load(accepted_keys + slot * accepted_keys_slot + n * accepted_keys_branch, mask=n < branches, other=-1)
    last = tl.load(bonus_keys + slot * bonus_keys_slot + n * bonus_keys_branch, mask=n < branches, other=-1)
    same = (keys >= 0) & (keys == k) & (last == token)
    first = tl.min(tl.where(same, n, branches), 0)
    full = tl.load(depth + slot * depth_slot) == num_drafts
    hit = (first < branches) & right & is_read & full

    j = tl.arange(0, BLOCK_K)
    inside = j < num_drafts
    at = drafts + slot * drafts_slot + tl.where(hit, first, 0).to(tl.int64) * drafts_branch
    its = tl.load(at + j * drafts_position, mask=j < tl.where(hit, num_drafts, 0), other=0)
    drafted = tl.where(hit, its, tl.where(has_token, token, 0))
    tl.store(speculation + row * speculation_row + j * speculation_position, drafted, mask=inside)
    tl.store(tokens + row * tokens_row + j * tokens_position, drafted, mask=inside)
    tl.store(branch + row * branch_row, tl.where(hit, first, -1).to(tl.int64))
    tl.store(ready + row * ready_row, tl.where(hit, num_drafts, 0))
