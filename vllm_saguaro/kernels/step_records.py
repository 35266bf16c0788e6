"""`algorithm.step_records` as Triton kernels. No GPU has run them yet: they run interpreted, and compile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_saguaro.algorithm import step_records as twin

_ROW_HEADER = tl.constexpr(twin.ROW_HEADER)
_RECORD_HEADER = tl.constexpr(twin.RECORD_HEADER)
_ROW_WEIGHT = tl.constexpr(twin.ROW_WEIGHT)
_ROWS, _TILE = 64, 256
"""Rows of a tile of a record; words of a tile that is copied."""


def copy_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Rows of `source` [S] or [S, W] int64, copied: see the twin.

    The source may lie in memory of the host that another process writes. So it is read past all caches, and a launch
    behind this one in the stream reads nothing before this one has. Grid: a program a row and tile.
    """
    count, width = rows.shape[0], source[0].numel()
    copied = torch.empty((count, *source.shape[1:]), dtype=source.dtype, device=rows.device)
    if count:
        _copy_rows[(count, triton.cdiv(width, _TILE))](
            source,
            source.stride(0),
            source.stride(1) if source.dim() > 1 else 1,
            rows,
            rows.stride(0),
            copied,
            width,
            BLOCK=min(_TILE, triton.next_power_of_2(width)),
            num_warps=1,
        )
    return copied


def copy_branches(source: Tensor, cells: Tensor, branch: Tensor) -> Tensor:
    """What `source` [C, K, N, M] int64 has of one branch of each cell, copied: see the twin.

    It is read as `copy_rows` reads. Grid: a program a cell and depth.
    """
    count, depths, width = cells.shape[0], source.shape[1], source.shape[3]
    copied = torch.empty(count, depths, width, dtype=source.dtype, device=cells.device)
    if count:
        _copy_branches[(count, depths)](
            source,
            *source.stride(),
            cells,
            cells.stride(0),
            branch,
            branch.stride(0),
            copied,
            depths,
            width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=1,
        )
    return copied


def take_drafts(
    before: Tensor,
    head: Tensor,
    body: Tensor,
    after: Tensor,
    state: Tensor,
    slots: Tensor,
    accepted: Tensor,
    verified: Tensor,
    bonus: Tensor,
    lengths: Tensor,
    vocab_size: int,
    rows: Tensor,
    stamps: Tensor,
    branch: Tensor,
    tokens: Tensor,
    ready: Tensor,
) -> None:
    """Find each row's drafts, and write what is to be told of it: see the twin.

    Grid: one program (a warp) a row, each of another slot. It reads 8 N + 8 K bytes of the copies: the time of a
    launch, some 3 us, where the twin is some eighty launches between the target's sampling and its next pass.
    """
    count, num_drafts = tokens.shape
    branches = body.shape[1] // (1 + num_drafts)
    if count:
        _take[(count,)](
            before,
            before.stride(0),
            head,
            *head.stride(),
            body,
            *body.stride(),
            after,
            after.stride(0),
            state,
            *state.stride(),
            slots,
            slots.stride(0),
            accepted,
            accepted.stride(0),
            verified,
            verified.stride(0),
            bonus,
            bonus.stride(0),
            lengths,
            lengths.stride(0),
            rows,
            *rows.stride(),
            stamps,
            *stamps.stride(),
            branch,
            branch.stride(0),
            tokens,
            *tokens.stride(),
            ready,
            ready.stride(0),
            vocab_size,
            branches,
            num_drafts,
            BLOCK_N=triton.next_power_of_2(branches),
            BLOCK_K=triton.next_power_of_2(num_drafts),
            num_warps=1,
        )


def seal_record(record: Tensor, rows: int, row_words: int, number: int, head: int) -> None:
    """Write the header of a record whose rows are there: see the twin.

    One program; it reads the rows once, 24 KB for 256 of them at K = 4. Compiled once for all numbers and row counts.
    """
    _seal[(1,)](
        record,
        record.stride(0),
        rows,
        row_words,
        number,
        head,
        BLOCK_B=_ROWS,
        BLOCK_W=triton.next_power_of_2(row_words),
        num_warps=4,
    )


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    source,
    source_row,
    source_word,
    rows,
    rows_row,
    copied,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < width
    at = source + tl.load(rows + row * rows_row).to(tl.int64) * source_row + word * source_word
    tl.store(copied + row * width + word, tl.load(at, mask=inside, cache_modifier=".cv"), mask=inside)


@triton.jit
def _copy_branches(  # type: ignore[no-untyped-def]
    source,
    source_cell,
    source_depth,
    source_branch,
    source_word,
    cells,
    cells_row,
    branch,
    branch_row,
    copied,
    depths,
    width,
    BLOCK: tl.constexpr,
):
    row, depth = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cell = tl.load(cells + row * cells_row).to(tl.int64)
    n = tl.load(branch + row * branch_row).to(tl.int64)
    word = tl.arange(0, BLOCK)
    inside = word < width
    at = source + cell * source_cell + depth * source_depth + n * source_branch + word * source_word
    found = tl.load(at, mask=inside, cache_modifier=".cv")
    tl.store(copied + (row * depths + depth) * width + word, found, mask=inside)


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    before,
    before_row,
    head,
    head_row,
    head_word,
    body,
    body_row,
    body_word,
    after,
    after_row,
    state,
    state_slot,
    state_word,
    slots,
    slots_row,
    accepted,
    accepted_row,
    verified,
    verified_row,
    bonus,
    bonus_row,
    lengths,
    lengths_row,
    rows,
    rows_row,
    rows_word,
    stamps,
    stamps_row,
    stamps_word,
    branch,
    branch_row,
    tokens,
    tokens_row,
    tokens_position,
    ready,
    ready_row,
    vocab_size,
    branches,
    num_drafts,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row * slots_row).to(tl.int64)
    k = tl.load(accepted + row * accepted_row).to(tl.int64)
    token = tl.minimum(tl.maximum(tl.load(bonus + row * bonus_row), 0), vocab_size - 1)
    mine = state + slot * state_slot
    generation, round_ = tl.load(mine), tl.load(mine + state_word)
    under_verification = tl.load(mine + 2 * state_word)

    sequence = tl.load(before + row * before_row)
    cell = head + row * head_row
    count, depth = tl.load(cell + 3 * head_word), tl.load(cell + 4 * head_word)
    whole = (sequence == tl.load(after + row * after_row)) & (sequence & 1 == 0)
    possible = (count >= 0) & (count <= branches) & (depth >= 0) & (depth <= num_drafts)
    of_generation, of_round = tl.load(cell + head_word), tl.load(cell + 2 * head_word)
    awaited = whole & possible & (generation > 0) & (of_generation == generation) & (of_round == round_)

    # A key is k << 32 | t*: compared in one piece, and never equal for a row without a token.
    n = tl.arange(0, BLOCK_N)
    keys = tl.load(body + row * body_row + n * body_word, mask=n < branches, other=-1)
    same = awaited & (n < count) & (k >= 0) & (keys == (k << 32 | token))
    first = tl.min(tl.where(same, n, branches), 0)
    hit = first < branches
    first = tl.where(hit, first, 0).to(tl.int64)

    j = tl.arange(0, BLOCK_K)
    inside = j < num_drafts
    given = tl.where(hit, depth, 0)
    its = body + row * body_row + (branches + j * branches + first) * body_word
    found = tl.load(its, mask=j < given, other=0) & 0xFFFFFFFF
    foreign = tl.max(((j < given) & (found >= vocab_size)).to(tl.int32), 0) > 0
    given = tl.where(foreign, 0, given)
    drafted = tl.where(j < given, found, token)

    told = rows + row * rows_row
    tl.store(told, slot)
    tl.store(told + rows_word, generation)
    tl.store(told + 2 * rows_word, round_)
    tl.store(told + 3 * rows_word, k)
    judged = tl.minimum(under_verification, tl.load(verified + row * verified_row).to(tl.int64))
    tl.store(told + 4 * rows_word, judged)
    tl.store(told + 5 * rows_word, token)
    tl.store(told + 6 * rows_word, tl.load(lengths + row * lengths_row).to(tl.int64))
    tl.store(told + 7 * rows_word, given)
    tl.store(told + (_ROW_HEADER + j) * rows_word, drafted, mask=inside)

    tl.store(stamps + row * stamps_row, generation)
    tl.store(stamps + row * stamps_row + stamps_word, round_)
    tl.store(stamps + row * stamps_row + 2 * stamps_word, sequence)
    tl.store(branch + row * branch_row, first)
    tl.store(tokens + row * tokens_row + j * tokens_position, drafted, mask=inside)
    tl.store(ready + row * ready_row, given.to(tl.int32))
    tl.store(mine + state_word, round_ + 1, mask=k >= 0)
    tl.store(mine + 2 * state_word, given, mask=k >= 0)


@triton.jit(do_not_specialize=["rows", "number", "head"])
def _seal(  # type: ignore[no-untyped-def]
    record,
    record_word,
    rows,
    row_words,
    number: tl.int64,  # else typed by its value, and compiled anew for another type
    head: tl.int64,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row, word = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK_W)[None, :]
    sums = tl.zeros((BLOCK_B, BLOCK_W), tl.int64)
    for first in range(0, rows, BLOCK_B):
        inside = (first + row < rows) & (word < row_words)
        at = ((first + row) * row_words + word).to(tl.int64)
        words = tl.load(record + (_RECORD_HEADER + at) * record_word, mask=inside, other=0)
        sums += words * ((2 * at + 1) * _ROW_WEIGHT)
    total = tl.sum(tl.sum(sums, 1), 0)
    tl.store(record, number)
    tl.store(record + record_word, rows)
    tl.store(record + 2 * record_word, total + head)
