"""`algorithm.outcome_ranking` as Triton kernels. No GPU has run them yet: they run under the interpreter, and compile.

A sort is not needed: the place of an outcome is the number of those that are better, and no two have the same place
since ties go by index. That is the same on every run, whatever order the programs run in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64
"""Outcomes that a program compares with its own at a time: M x 64 comparisons in registers."""


def ranked_outcomes(
    candidates: Tensor,
    log_q: Tensor,
    drafts: Tensor,
    under_verification: Tensor,
    accept: Tensor,
    branches: int,
    room: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted [B, N], bonus [B, N], log_p [B, N]): see the twin.

    Two kernels, each with one program for a row and a position: the probabilities (so that every program ranks the very
    same numbers), then the ranks. They read 20 (K+1) M bytes a row and (K+1)^2 M floats out of the cache, and
    compare ((K+1) M)^2 pairs a row: some 10 us together for 64 rows with K = 5, M = 64, less than 100 us with K = 16.
    """
    rows, positions, per_position = candidates.shape
    device = candidates.device
    scratch = torch.empty(rows, positions * per_position, dtype=torch.float32, device=device)
    accepted = torch.empty(rows, branches, dtype=torch.int32, device=device)
    bonus = torch.empty(rows, branches, dtype=torch.int64, device=device)
    log_p = torch.empty(rows, branches, dtype=torch.float32, device=device)
    if not rows:
        return accepted, bonus, log_p
    block = triton.next_power_of_2(per_position)
    _probabilities[(rows, positions)](
        candidates,
        *candidates.stride(),
        log_q,
        *log_q.stride(),
        drafts,
        *drafts.stride(),
        under_verification,
        under_verification.stride(0),
        accept,
        *accept.stride(),
        room,
        room.stride(0),
        scratch,
        positions,
        per_position,
        BLOCK_K=triton.next_power_of_2(positions),
        BLOCK_M=block,
        num_warps=2,
    )
    spare = branches - positions * per_position
    _ranks[(rows, positions)](
        candidates,
        *candidates.stride(),
        scratch,
        accepted,
        bonus,
        log_p,
        positions,
        per_position,
        branches,
        BLOCK_M=block,
        TILE=_TILE,
        BLOCK_SPARE=triton.next_power_of_2(spare) if spare > 0 else 0,
        num_warps=4,
    )
    return accepted, bonus, log_p


@triton.jit
def _probabilities(  # type: ignore[no-untyped-def]
    candidates,
    candidates_row,
    candidates_position,
    candidates_candidate,
    log_q,
    log_q_row,
    log_q_position,
    log_q_candidate,
    drafts,
    drafts_row,
    drafts_position,
    under_verification,
    under_verification_row,
    accept,
    accept_row,
    accept_position,
    room,
    room_row,
    scratch,
    positions,
    per_position,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    n = tl.load(under_verification + row * under_verification_row)

    # log of a_1 .. a_k (1 - a_{k+1})
    j = tl.arange(0, BLOCK_K)
    a = tl.load(accept + row * accept_row + j * accept_position, mask=(j < positions - 1) & (j < n), other=0.0)
    # A comparison, not tl.minimum: what is no number must stay none
    a = tl.where(a < 0.0, 0.0, tl.where(a > 1.0, 1.0, a))
    length = tl.sum(tl.where(j < k, tl.log(tl.where(j < k, a, 1.0)), 0.0), 0)
    stopped = tl.sum(tl.where(j == k, tl.log(1.0 - tl.where(j == k, a, 0.0)), 0.0), 0)
    length += stopped  # 0 at k = n: nothing is accepted beyond

    m = tl.arange(0, BLOCK_M)
    inside = m < per_position
    tokens = tl.load(
        candidates + row * candidates_row + k * candidates_position + m * candidates_candidate, mask=inside, other=-1
    )
    left = tl.load(log_q + row * log_q_row + k * log_q_position + m * log_q_candidate, mask=inside, other=float("-inf"))
    rejected = k < n
    draft = tl.load(drafts + row * drafts_row + k * drafts_position, mask=rejected, other=-1)
    left = tl.where((tokens == draft) & (m >= tl.where(rejected, 0, BLOCK_M)), float("-inf"), left)
    most = tl.max(left, 0)
    log_p = length + left - (most + tl.log(tl.sum(tl.exp(left - most), 0)))
    possible = (k <= n) & (k < tl.load(room + row * room_row))
    # -inf where it is NaN, too
    log_p = tl.where(log_p > float("-inf"), log_p, float("-inf"))
    log_p = tl.where(possible, log_p, float("-inf"))
    tl.store(scratch + (row * positions + k) * per_position + m, log_p, mask=inside)


@triton.jit
def _ranks(  # type: ignore[no-untyped-def]
    candidates,
    candidates_row,
    candidates_position,
    candidates_candidate,
    scratch,
    accepted,
    bonus,
    log_p,
    positions,
    per_position,
    branches,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SPARE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    total = positions * per_position
    of_row = scratch + row * total

    m = tl.arange(0, BLOCK_M)
    inside = m < per_position
    index = k * per_position + m
    own = tl.load(of_row + index, mask=inside, other=float("-inf"))
    rank = tl.zeros([BLOCK_M], dtype=tl.int32)
    for start in range(0, total, TILE):
        other = start + tl.arange(0, TILE)
        value = tl.load(of_row + other, mask=other < total, other=float("-inf"))
        earlier = (other[None, :] < index[:, None]) & (value[None, :] == own[:, None])
        better = ((value[None, :] > own[:, None]) | earlier) & (other < total)[None, :]
        rank += tl.sum(better.to(tl.int32), 1)

    tokens = tl.load(
        candidates + row * candidates_row + k * candidates_position + m * candidates_candidate, mask=inside, other=0
    )
    there = own > float("-inf")
    chosen = inside & (rank < branches)
    at = row * branches + rank
    tl.store(accepted + at, tl.where(there, k, -1), mask=chosen)
    tl.store(bonus + at, tl.where(there, tokens, 0), mask=chosen)
    tl.store(log_p + at, own, mask=chosen)

    if BLOCK_SPARE > 0:  # fewer outcomes than branches
        entry = total + tl.arange(0, BLOCK_SPARE)
        spare = entry < tl.where(k == 0, branches, 0)
        tl.store(accepted + row * branches + entry, tl.full([BLOCK_SPARE], -1, tl.int32), mask=spare)
        tl.store(bonus + row * branches + entry, tl.zeros([BLOCK_SPARE], tl.int64), mask=spare)
        tl.store(log_p + row * branches + entry, tl.full([BLOCK_SPARE], float("-inf"), tl.float32), mask=spare)
