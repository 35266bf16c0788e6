"""`algorithm.branch_tables` as Triton kernels. No GPU has run them yet: they run under the interpreter, and compile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 1024
"""Entries of a table that one program writes."""
_ELEMENTS = 2048
"""Elements of a block that one program copies."""
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""By size in bytes. What is copied is bits: no type of a cache matters, and no NaN is changed."""


def fork(
    main: Tensor, private: Tensor, slots: Tensor, lengths: Tensor, accepted: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(tables [B*N, W], source [B*N], destination [B*N]): see the twin.

    Grid: one program for a branch and 1024 entries of its table. It reads and writes 4 bytes an entry, the text's table
    mostly out of the cache: 6 MB, some 5 us, for 64 rows of 24 branches with W = 1024 (16k tokens).
    """
    rows, branches = accepted.shape
    width, owned = main.shape[1], private.shape[2]
    tables = torch.empty(rows * branches, width, dtype=torch.int32, device=main.device)
    source = torch.empty(rows * branches, dtype=torch.int32, device=main.device)
    destination = torch.empty(rows * branches, dtype=torch.int32, device=main.device)
    if rows * branches:
        block = min(triton.next_power_of_2(width), _ENTRIES)
        _fork[(rows * branches, triton.cdiv(width, block))](
            main,
            *main.stride(),
            private,
            *private.stride(),
            slots,
            slots.stride(0),
            lengths,
            lengths.stride(0),
            accepted,
            *accepted.stride(),
            tables,
            source,
            destination,
            branches,
            width,
            owned,
            BLOCK_SIZE=block_size,
            BLOCK_W=block,
            num_warps=4,
        )
    return tables, source, destination


def copy_blocks(pages: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy blocks in every layer, in place: see the twin.

    Grid: one program for a copy, a layer and 2048 elements (of 8 bytes where all fits, as in pages of bytes); where
    there is nothing to copy it ends at once. It reads and writes each block once: bound by memory. 1 MiB (64 KiB in
    each of 16 layers) is 2 MiB of traffic, so 1536 copies take 1 ms on an H100, 24 copies some 20 us.

    Raises ValueError if the elements of one block lie in memory neither in one piece nor in pieces evenly apart.
    """
    bits = _widest(pages)
    outer, outer_stride, inner = _pieces(bits)
    if not source.shape[0] or not pages.shape[0]:
        return
    block = min(triton.next_power_of_2(inner), _ELEMENTS)
    _copy[(source.shape[0], pages.shape[0], outer * triton.cdiv(inner, block))](
        bits,
        bits.stride(0),
        bits.stride(1),
        outer_stride,
        source,
        source.stride(0),
        destination,
        destination.stride(0),
        inner,
        triton.cdiv(inner, block),
        BLOCK=block,
        num_warps=4,
    )


def adopt(main: Tensor, private: Tensor, slots: Tensor, branch: Tensor, first: Tensor) -> None:
    """Swap block ids of the branch that came true with the text's, in place: see the twin.

    Grid: one program (a warp) a row, 16 P bytes of traffic on a hit: the time of a launch, some 3 us.
    """
    if slots.shape[0]:
        _adopt[(slots.shape[0],)](
            main,
            *main.stride(),
            private,
            *private.stride(),
            slots,
            slots.stride(0),
            branch,
            branch.stride(0),
            first,
            first.stride(0),
            main.shape[1],
            private.shape[2],
            BLOCK_P=triton.next_power_of_2(private.shape[2]),
            num_warps=1,
        )


def _widest(pages: Tensor) -> Tensor:
    """The same memory as the largest integers that it can be seen as."""
    size = pages.element_size()
    if pages.dim() < 3 or pages.stride(-1) != 1:
        return pages.view(_INTEGERS[size])
    offsets = (pages.data_ptr(), pages.shape[-1] * size, *(stride * size for stride in pages.stride()[:-1]))
    return next(pages.view(kind) for wide, kind in _INTEGERS.items() if all(offset % wide == 0 for offset in offsets))


def _pieces(pages: Tensor) -> tuple[int, int, int]:
    """(how many, stride, size) of the pieces of memory, in elements, that make one block of one layer."""
    dimensions = sorted(
        ((stride, size) for stride, size in zip(pages.stride()[2:], pages.shape[2:], strict=True) if size != 1)
    )
    inner = 1
    while dimensions and dimensions[0][0] == inner:
        inner *= dimensions.pop(0)[1]
    if not dimensions:
        return 1, 0, inner
    outer_stride, outer = dimensions.pop(0)
    while dimensions and dimensions[0][0] == outer_stride * outer:
        outer *= dimensions.pop(0)[1]
    if dimensions:
        raise ValueError(
            f"a block of pages with shape {tuple(pages.shape)} and strides {pages.stride()} is scattered over memory: "
            "lay its elements out in one piece, or in pieces evenly apart"
        )
    return outer, outer_stride, inner


@triton.jit
def _fork(  # type: ignore[no-untyped-def]
    main,
    main_slot,
    main_entry,
    private,
    private_slot,
    private_branch,
    private_entry,
    slots,
    slots_row,
    lengths,
    lengths_row,
    accepted,
    accepted_row,
    accepted_branch,
    tables,
    source,
    destination,
    branches,
    width,
    owned,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    x = tl.program_id(0).to(tl.int64)
    row = x // branches
    n = x % branches
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    k = tl.load(accepted + row * accepted_row + n * accepted_branch)
    real = k >= 0
    start = tl.where(real, tl.load(lengths + row * lengths_row) + k, 0)
    first = start // BLOCK_SIZE
    text = main + slot * main_slot
    mine = private + slot * private_slot + n * private_branch

    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    own = column - first
    inside = column < width
    read = tl.load(text + column.to(tl.int64) * main_entry, mask=inside & (own < 0), other=0)
    entry = tl.minimum(tl.maximum(own, 0), owned - 1)
    written = tl.load(mine + entry * private_entry, mask=inside & (own >= 0), other=0)
    tl.store(tables + x * width + column, tl.where(own < 0, read, written), mask=inside)

    if tl.program_id(1) == 0:
        copied = (start % BLOCK_SIZE != 0) & (first < width)  # 0 where there is no branch
        from_block = tl.load(text + first.to(tl.int64) * main_entry, mask=copied, other=-1)
        to_block = tl.load(mine, mask=copied, other=-1)
        tl.store(source + x, from_block)
        tl.store(destination + x, to_block)


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    pages,
    pages_layer,
    pages_block,
    pages_piece,
    source,
    source_copy,
    destination,
    destination_copy,
    inner,
    chunks,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0).to(tl.int64)
    from_block = tl.load(source + copy * source_copy).to(tl.int64)
    to_block = tl.load(destination + copy * destination_copy).to(tl.int64)
    if from_block >= 0:
        piece = (tl.program_id(2) // chunks).to(tl.int64)
        element = (tl.program_id(2) % chunks) * BLOCK + tl.arange(0, BLOCK)
        at = pages + tl.program_id(1).to(tl.int64) * pages_layer + piece * pages_piece
        inside = element < inner
        value = tl.load(at + from_block * pages_block + element, mask=inside)
        tl.store(at + to_block * pages_block + element, value, mask=inside)


@triton.jit
def _adopt(  # type: ignore[no-untyped-def]
    main,
    main_slot,
    main_entry,
    private,
    private_slot,
    private_branch,
    private_entry,
    slots,
    slots_row,
    branch,
    branch_row,
    first,
    first_row,
    width,
    owned,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(branch + row * branch_row).to(tl.int64)
    if n >= 0:
        slot = tl.load(slots + row * slots_row).to(tl.int64)
        p = tl.arange(0, BLOCK_P)
        entry = tl.load(first + row * first_row).to(tl.int64) + p
        swapped = (p < owned) & (entry < width)
        text = main + slot * main_slot + entry * main_entry
        mine = private + slot * private_slot + n * private_branch + p * private_entry
        of_text = tl.load(text, mask=swapped, other=0)
        of_branch = tl.load(mine, mask=swapped, other=0)
        tl.store(text, of_branch, mask=swapped)
        tl.store(mine, of_text, mask=swapped)
