"""What a runner's step says of each row, and what its drafts are booked as: around the draft, on the target's stream.

Shapes: R request slots, B rows of the step, K drafts. Every shape depends on the shapes of the arguments alone and
nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIT, NOT_PREDICTED, ABSENT, NO_OUTCOME = range(4)
"""What a row was: it has drafts; the draft side has its request, and no drafts; it has not; the row got no token."""


def gather_outcomes(
    slots: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    last_sampled: Tensor,
    total_length: Tensor,
    temperature: Tensor,
    certain: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `DeviceOutcomes`: slots, accepted, verified, bonus, lengths, temperature; each [B].

    slots         [B]     integers, all different
    num_sampled   [B]     integers: tokens that the step gave the row, 0 where it gave none
    num_rejected  [B]     integers: drafts that were verified and not accepted
    last_sampled  [R, 1]  int64: the newest token of each slot
    total_length  [R]     int32: tokens of each slot's text
    temperature   [R]     float32
    certain       [R]     bool: drafts are certain whatever the temperature says, so 0 is given for it
    """
    where = slots.to(torch.int64)
    return (
        where,
        num_sampled.to(torch.int32) - 1,
        (num_sampled + num_rejected).to(torch.int32) - 1,
        last_sampled[where, 0],
        total_length[where],
        temperature[where].masked_fill(certain[where], 0.0),
    )


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
    """Book what the rows of a step have to verify next. Changes the last three in place.

    drafts    [B, K] int64  whatever the draft side says
    depth     [B] int32     how many of them it says are real
    slots     [B] int64     all different
    accepted  [B] int32     negative: the row got no token
    most      [R] int32     drafts that a slot's request may have: 0 where the draft side has it not
    tokens    [B, K] int64  the drafts, brought into 0 .. `last_token`: they index an embedding unchecked
    ready     [R] int32     by slot: how many are real
    counts    [4] int64     rows by what they were (`HIT` and so on), added to
    """
    allowed = most[slots]
    real = torch.minimum(depth, allowed).masked_fill(accepted < 0, 0)
    torch.clamp(drafts, 0, last_token, out=tokens)
    ready.index_copy_(0, slots, real)
    kind = torch.where(allowed > 0, NOT_PREDICTED, ABSENT)
    kind = torch.where(real > 0, HIT, kind)
    kind = torch.where(accepted < 0, NO_OUTCOME, kind)
    counts.scatter_add_(0, kind, torch.ones_like(kind))
