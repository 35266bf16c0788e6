"""What the draft model needs for the next step of each branch: one token further, without the host.

Shapes: X branches, W the width of a block table. Nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD_SLOT = -1
"""The slot of a token whose keys and values are kept nowhere, as in vLLM."""


def branch_step(
    tokens: Tensor,
    positions: Tensor,
    tables: Tensor,
    block_size: int,
    limit: int,
    input_ids: Tensor,
    lengths: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Put `tokens` one position further in each branch, in place.

    tokens        [X] int64     read: the token that each branch drew
    positions     [X] int64     += 1
    tables        [X, W] int32  read
    block_size, limit           tokens of a block, and of the longest text: at most W * block_size
    input_ids     [X] int64     := tokens
    lengths       [X] int32     := positions + 1, at most `limit`: attention reads no entry that a table does not have
    slot_mapping  [X] int64     := tables[x, position // block_size] * block_size + position % block_size,
                                PAD_SLOT at positions >= limit
    """
    positions += 1
    input_ids.copy_(tokens)
    lengths.copy_((positions + 1).clamp_max(limit))
    inside = positions < limit
    entry = torch.div(torch.where(inside, positions, 0), block_size, rounding_mode="floor")
    block = tables.gather(1, entry.unsqueeze(1)).squeeze(1).to(torch.int64)
    slot_mapping.copy_(torch.where(inside, block * block_size + positions % block_size, PAD_SLOT))
