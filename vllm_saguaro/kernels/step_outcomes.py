"""`algorithm.step_outcomes` as Triton kernels. No GPU has run them yet: they run interpreted, and compile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_saguaro.algorithm import step_outcomes as twin

_HIT, _NOT_PREDICTED = tl.constexpr(twin.HIT), tl.constexpr(twin.NOT_PREDICTED)
_ABSENT, _NO_OUTCOME = tl.constexpr(twin.ABSENT), tl.constexpr(twin.NO_OUTCOME)


def gather_outcomes(
    slots: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    last_sampled: Tensor,
    total_length: Tensor,
    temperature: Tensor,
    certain: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `DeviceOutcomes`: see the twin. Grid: one program a row, each a few words."""
    rows, device = slots.shape[0], slots.device
    # Each an allocation: Triton compiles anew for a pointer that is aligned otherwise.
    where, bonus = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    accepted, verified, lengths = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
    degrees = torch.empty(rows, dtype=torch.float32, device=device)
    if rows:
        _gather[(rows,)](
            slots,
            slots.stride(0),
            num_sampled,
            num_sampled.stride(0),
            num_rejected,
            num_rejected.stride(0),
            last_sampled,
            last_sampled.stride(0),
            total_length,
            total_length.stride(0),
            temperature,
            temperature.stride(0),
            certain,
            certain.stride(0),
            where,
            accepted,
            verified,
            bonus,
            lengths,
            degrees,
            num_warps=1,
        )
    return where, accepted, verified, bonus, lengths, degrees


def book_drafts(
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    most: Tensor,
    last_token: int,
    tokens: Tensor,
    ready: Tensor,
    counts: Tensor,
) -> None:
    """Book what the rows of a step have to verify next: see the twin.

    Grid: one program (a warp) a row. Rows of one kind add to the same of four words.
    """
    rows, num_drafts = drafts.shape
    if rows:
        _book[(rows,)](
            drafts,
            *drafts.stride(),
            depth,
            depth.stride(0),
            slots,
            slots.stride(0),
            accepted,
            accepted.stride(0),
            most,
            most.stride(0),
            tokens,
            *tokens.stride(),
            ready,
            ready.stride(0),
            counts,
            counts.stride(0),
            num_drafts,
            last_token,
            BLOCK_K=triton.next_power_of_2(num_drafts),
            num_warps=1,
        )


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    slots,
    slots_row,
    num_sampled,
    num_sampled_row,
    num_rejected,
    num_rejected_row,
    last_sampled,
    last_sampled_slot,
    total_length,
    total_length_slot,
    temperature,
    temperature_slot,
    certain,
    certain_slot,
    where,
    accepted,
    verified,
    bonus,
    lengths,
    degrees,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    given = tl.load(num_sampled + row * num_sampled_row).to(tl.int32)
    left = tl.load(num_rejected + row * num_rejected_row).to(tl.int32)
    tl.store(where + row, slot)
    tl.store(accepted + row, given - 1)
    tl.store(verified + row, given + left - 1)
    tl.store(bonus + row, tl.load(last_sampled + slot * last_sampled_slot))
    tl.store(lengths + row, tl.load(total_length + slot * total_length_slot))
    is_certain = tl.load(certain + slot * certain_slot) != 0
    tl.store(degrees + row, tl.where(is_certain, 0.0, tl.load(temperature + slot * temperature_slot)))


@triton.jit
def _book(  # type: ignore[no-untyped-def]
    drafts,
    drafts_row,
    drafts_position,
    depth,
    depth_row,
    slots,
    slots_row,
    accepted,
    accepted_row,
    most,
    most_slot,
    tokens,
    tokens_row,
    tokens_position,
    ready,
    ready_slot,
    counts,
    counts_kind,
    num_drafts,
    last_token,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    has_token = tl.load(accepted + row * accepted_row) >= 0
    allowed = tl.load(most + slot * most_slot)
    real = tl.where(has_token, tl.minimum(tl.load(depth + row * depth_row), allowed), 0)

    j = tl.arange(0, BLOCK_K)
    inside = j < num_drafts
    found = tl.load(drafts + row * drafts_row + j * drafts_position, mask=inside, other=0)
    found = tl.minimum(tl.maximum(found, 0), last_token)
    tl.store(tokens + row * tokens_row + j * tokens_position, found, mask=inside)
    tl.store(ready + slot * ready_slot, real)

    kind = tl.where(allowed > 0, _NOT_PREDICTED, _ABSENT)
    kind = tl.where(real > 0, _HIT, kind)
    kind = tl.where(has_token, kind, _NO_OUTCOME).to(tl.int64)
    one = tl.full((), 1, tl.int64)
    tl.atomic_add(counts + kind * counts_kind, one, sem="relaxed")
