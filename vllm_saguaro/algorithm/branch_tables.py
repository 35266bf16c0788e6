"""The block tables of the branches: made when a round forks, swapped into the request's own when one of them came true.

Every block belongs to one slot for good: its text's blocks (`main`) and P for each branch (`private`). A branch reads
the text from the main blocks and writes into its own; the block in which it begins is copied. On a hit the ids of the
blocks written by the branch and of those that they replace change places, so nothing is allocated or freed here.

Shapes: R slots, W the width of a table, N branches a slot, P = ceil((block_size - 1 + K) / block_size) private blocks a
branch; B rows, row b speaks of slot `slots[b]`. Every shape depends on the shapes of the arguments alone and nothing
waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -1
"""In the place of a block that is not to be copied, of a branch that was not hit."""


def fork(
    main: Tensor, private: Tensor, slots: Tensor, lengths: Tensor, accepted: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(tables [B*N, W] int32, source [B*N] int32, destination [B*N] int32) of N branches of each row.

    main      [R, W] int32     the blocks of each slot's text
    private   [R, N, P] int32  the blocks of each slot's branches
    slots     [B] int64        in 0 .. R - 1
    lengths   [B] int32        tokens of the text with the bonus token, before the drafts under verification
    accepted  [B, N] int32     k of each branch; negative: no branch

    A branch begins at the position p = lengths + k, where its own bonus token stands: the main blocks below
    p // block_size, from there on its private ones, the last of them again and again where W leaves room. If p lies
    inside of a block, that block is to be copied: `source` to `destination`, else NOTHING. The table of "no branch" is
    private throughout, so that what is written through it goes nowhere that matters.
    """
    width, owned = main.shape[1], private.shape[2]
    start = lengths.unsqueeze(1) + accepted
    real = accepted >= 0
    first = torch.where(real, torch.div(start, block_size, rounding_mode="floor"), 0).to(torch.int64)  # [B, N]
    column = torch.arange(width, device=main.device)
    own = column - first.unsqueeze(-1)
    text, mine = main[slots], private[slots]
    tables = torch.where(own < 0, text.unsqueeze(1), mine.gather(2, own.clamp(0, owned - 1)))
    copied = real & (torch.remainder(start, block_size) != 0) & (first < width)
    source = torch.where(copied, text.gather(1, first.clamp_max(width - 1)), NOTHING)
    destination = torch.where(copied, mine[..., 0], NOTHING)
    return tables.flatten(0, 1), source.flatten(), destination.flatten()


def copy_blocks(pages: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy the block source[x] to destination[x] in every layer, in place; nothing where they are NOTHING.

    pages        [L, blocks, ...]  of any type
    source       [X] int32
    destination  [X] int32         none twice, and none of them a source of the same call
    """
    if not source.shape[0]:
        return
    real = source >= 0
    # Where there is nothing to do, one of the copies is done again; where there are none at all, block 0 to itself
    again = real.to(torch.int8).argmax(0, keepdim=True)
    source = torch.where(real, source, source[again]).clamp_min(0)
    destination = torch.where(real, destination, destination[again]).clamp_min(0)
    pages.index_copy_(1, destination.to(torch.int64), pages.index_select(1, source))


def adopt(main: Tensor, private: Tensor, slots: Tensor, branch: Tensor, first: Tensor) -> None:
    """Swap main[slot, first : first + P] with private[slot, branch] for each row that was hit, in place.

    main     [R, W] int32
    private  [R, N, P] int32
    slots    [B] int64   in 0 .. R - 1, those of hits distinct
    branch   [B] int64   the branch that came true; negative: a miss, nothing changes
    first    [B] int64   the table entry in which it began, not negative; what lies beyond W stays
    """
    width, owned = main.shape[1], private.shape[2]
    # By slot: a row without a hit may speak of the same slot as another, and must not write what it read before
    which = torch.full((main.shape[0],), NOTHING, dtype=torch.int64, device=main.device)
    which = which.scatter_reduce(0, slots, branch, "amax")
    where = torch.zeros_like(which).scatter_reduce(0, slots, torch.where(branch >= 0, first, 0), "amax")
    column = torch.arange(width, device=main.device) - where.unsqueeze(1)
    swapped = (column >= 0) & (column < owned) & (which >= 0).unsqueeze(1)
    index = which.clamp_min(0).view(-1, 1, 1).expand(-1, 1, owned)
    mine = private.gather(1, index).squeeze(1)
    entry = where.unsqueeze(1) + torch.arange(owned, device=main.device)
    given = (entry < width) & (which >= 0).unsqueeze(1)
    text = torch.where(given, main.gather(1, entry.clamp_max(width - 1)), mine)
    main.copy_(torch.where(swapped, mine.gather(1, column.clamp(0, owned - 1)), main))
    private.scatter_(1, index, text.unsqueeze(1))
