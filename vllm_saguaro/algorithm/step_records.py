"""A step of the target between a mailbox's tables and its records: what the outcomes find, and what is told of them.

The draft process writes its tables whenever it likes, so they come as copies out of its memory that were made one after
the other (`placement/device_tables.py`), and are believed only where those agree. What the target's device found goes
back as a record (`placement/records.py`), in rows of 64-bit words.

Shapes: B rows of the step, S slots, N branches, K drafts. Every shape depends on the shapes of the arguments alone and
nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_saguaro.algorithm.outcome_lookup import outcome_lookup

RECORD_HEADER, ROW_HEADER = 3, 8
"""Words of a record before its rows: number, rows, checksum. Words of a row before its drafts: slot, generation, round,
accepted, verified, bonus, length, ready."""
ROW_WEIGHT = 0x2545F491
"""Word i of the rows counts (2 i + 1) times this in the checksum: odd numbers, so that no change of a single word goes
unseen, and all different, so that no two may change places."""
_TOKEN = (1 << 32) - 1


def tables_of(
    before: Tensor, head: Tensor, body: Tensor, after: Tensor, generation: Tensor, round_: Tensor, num_drafts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables of B rows as `outcome_lookup` has them, row b being slot b, as far as each is the awaited one.

    before, after       [B]             the sequence of each table, copied before and after the rest
    head                [B, 6]          sequence, generation, round, branches, depth, nanoseconds
    body                [B, N (1 + K)]  k << 32 | t* of each branch, and the tokens of all branches at each depth
    generation, round_  [B]             of the awaited table; a generation of 0 awaits none

    All int64. A table is awaited where its sequence is even and has not changed (no other was begun in between) and its
    stamp is the one asked for. accepted_keys [B, N] int32, -1 where there is no branch; bonus_keys [B, N] and drafts
    [B, N, K] int64, in 0 .. 2**32 - 1 and not yet known to be tokens; depth [B] int32, 0 where nothing is awaited.
    """
    branches = body.shape[1] // (1 + num_drafts)
    _, of_generation, of_round, count, depth, _ = head.unbind(1)
    whole = (before == after) & (before & 1 == 0)
    possible = (count >= 0) & (count <= branches) & (depth >= 0) & (depth <= num_drafts)
    awaited = whole & possible & (generation > 0) & (of_generation == generation) & (of_round == round_)
    there = awaited.unsqueeze(1) & (torch.arange(branches, device=body.device) < count.unsqueeze(1))
    tokens = body & _TOKEN
    return (
        torch.where(there, body[:, :branches] >> 32, -1).to(torch.int32),
        tokens[:, :branches],
        tokens[:, branches:].unflatten(1, (num_drafts, branches)).transpose(1, 2),
        torch.where(awaited, depth, 0).to(torch.int32),
    )


def copy_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Rows `rows` [B] int64 of `source` [S] or [S, W], copied: [B] or [B, W]. Of a view no word is read beside it."""
    return source.index_select(0, rows)


def copy_branches(source: Tensor, cells: Tensor, branch: Tensor) -> Tensor:
    """What `source` [C, K, N, M] has of one branch of each cell, copied: [B, K, M]; `cells`, `branch` [B] int64."""
    return source[cells, :, branch]


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
    """Find each row's drafts, and write what is to be told of it. Changes `state` and the last five in place.

    before, head, body, after: the tables of these rows, as `tables_of` has them
    state     [S, 3] int64  of each slot: generation, round, drafts under verification
    slots     [B] int64     all different
    accepted  [B] int32     k; negative: the row got no token, and its state stays
    verified  [B] int32     drafts in the pass, filler among them
    bonus     [B] int64     t*, brought into the vocabulary (`vocab_size`) where it is not
    lengths   [B] int32     tokens of the text with the bonus token
    rows      [B, 8 + K]    int64, the row of each in the record of the step
    stamps    [B, 3]        int64: generation, round and sequence of the table that the drafts are of
    branch    [B] int64     that was hit, 0 where none was
    tokens    [B, K] int64  its drafts; from the first that is not there on, the bonus token
    ready     [B] int32     how many are there. A draft that is no token makes the whole table suspect: 0
    """
    generation, round_, under_verification = state.index_select(0, slots).unbind(1)
    known = bonus.clamp(0, vocab_size - 1)
    tables = tables_of(before, head, body, after, generation, round_, tokens.shape[1])
    found, drafts, count = outcome_lookup(*tables, torch.arange(len(slots), device=slots.device), accepted, known)
    foreign = ((drafts < 0) | (drafts >= vocab_size)).any(1)
    count = torch.where(foreign, 0, count)
    drafts = torch.where(foreign.unsqueeze(1), known.unsqueeze(1), drafts)

    judged = torch.minimum(under_verification, verified)
    columns = (slots, generation, round_, accepted, judged, known, lengths, count)
    rows.copy_(torch.cat((torch.stack([column.to(torch.int64) for column in columns], 1), drafts), 1))
    stamps.copy_(torch.stack((generation, round_, before), 1))
    branch.copy_(found.clamp_min(0))
    tokens.copy_(drafts)
    ready.copy_(count)
    has_outcome = accepted >= 0
    next_ = (generation, round_ + has_outcome, torch.where(has_outcome, count, under_verification))
    state.index_copy_(0, slots, torch.stack(next_, 1))


def seal_record(record: Tensor, rows: int, row_words: int, number: int, head: int) -> None:
    """Write the header of a record whose rows are there: its number, how many rows, and the checksum of all of it.

    `record` [3 + W] int64 has room for W >= `rows` * `row_words` words of rows; `head` is what the header counts in the
    checksum (`placement.records.head_weight`). Sums and products are modulo 2**64.
    """
    body = record[RECORD_HEADER : RECORD_HEADER + rows * row_words]
    weights = (2 * torch.arange(len(body), device=record.device) + 1) * ROW_WEIGHT
    record[0].fill_(number)
    record[1].fill_(rows)
    torch.add((body * weights).sum(), head, out=record[2])
