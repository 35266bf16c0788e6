"""Tables and q as the device reads them: what `Mailbox.read` finds, or nothing, whenever the draft side writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.algorithm.outcome_lookup import outcome_lookup
from vllm_saguaro.algorithm.step_records import tables_of
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.messages import Proposals, Stamp, Table
from vllm_saguaro.placement.device_tables import TableCopies, TableReader
from vllm_saguaro.placement.layout import CONTROL_WORDS, MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox

SHAPE = MailboxShape(
    slots=2, branches=3, num_speculative_tokens=2, ring_bytes=64, support=4, vocab_size=100, device_steps=1
)
SLOT = 1
STAMP = Stamp(SLOT, 5, 6)


class Memory:
    """A mailbox, its draft side's end, and the device's reader."""

    def __init__(self) -> None:
        self.bytes = bytearray(SHAPE.total_bytes)
        self.box = Mailbox(memoryview(self.bytes), SHAPE)
        self.reader = TableReader(torch.frombuffer(self.bytes, dtype=torch.int64)[: SHAPE.ring_at // 8], SHAPE, TWINS)


@dataclass
class Tables:
    """What is believed of the tables of some rows; see `tables_of`."""

    version: Tensor
    accepted_keys: Tensor
    bonus_keys: Tensor
    drafts: Tensor
    depth: Tensor


def read(reader: TableReader, *stamps: Stamp) -> Tables:
    stamps = stamps or (STAMP,)
    slots, generation, round_ = torch.tensor([[s.slot, s.generation, s.round] for s in stamps]).unbind(1)
    found = reader.tables(slots)
    believed = tables_of(
        *(found.before, found.head, found.body, found.after), generation, round_, SHAPE.num_speculative_tokens
    )
    return Tables(found.before, *believed)


def contents(tables: Tables) -> tuple[list[tuple[int, int]], list[list[int]]] | None:
    """Keys and drafts [depth][branch] of the only row, where it is the awaited table."""
    if (tables.accepted_keys == -1).all():
        assert tables.depth.tolist() == [0]
        return None
    there = tables.accepted_keys[0] >= 0
    count, depth = int(there.sum()), int(tables.depth[0])
    assert there[:count].all()
    keys = list(zip(tables.accepted_keys[0, :count].tolist(), tables.bonus_keys[0, :count].tolist(), strict=True))
    return keys, tables.drafts[0, :count, :depth].T.tolist()


def parts(stamp: Stamp, seed: int, branches: int = 3) -> tuple[list[int], list[int], list[list[int]], list[Proposals]]:
    """A table that no other seed has any number of."""
    accepted, bonus = [i % 3 for i in range(branches)], [10 * seed + i for i in range(branches)]
    rows = [[10 * seed + 3 + 3 * d + i for i in range(branches)] for d in range(SHAPE.num_speculative_tokens)]
    random = np.random.default_rng(seed)
    q = []
    for row in rows:
        tokens = np.array([[token, (token + 31) % 100, (token + 57) % 100] for token in row], np.int32)
        weights = random.random((branches, 3)).astype(np.float32) + np.float32(0.1)
        q.append(Proposals(tokens, weights / weights.sum(1, keepdims=True)))
    return accepted, bonus, rows, q


def writes(box: Mailbox, stamp: Stamp, seed: int, sampled: bool = True) -> Iterator[None]:
    """Publish a table, one step of the writer at a time."""
    accepted, bonus, rows, q = parts(stamp, seed)
    for depth in range(len(rows) + 1):
        box.publish(
            Table(stamp, accepted, bonus, rows[:depth], 0.1, newest=q[depth - 1] if depth and sampled else None)
        )
        yield


def publish(box: Mailbox, stamp: Stamp = STAMP, seed: int = 1, depth: int = 2) -> None:
    for _ in itertools.islice(writes(box, stamp, seed), depth + 1):
        pass


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_table_is_read_as_far_as_it_is(depth: int) -> None:
    memory = Memory()
    publish(memory.box, depth=depth)
    accepted, bonus, rows, _ = parts(STAMP, 1)
    assert contents(read(memory.reader)) == (list(zip(accepted, bonus, strict=True)), rows[:depth])


@pytest.mark.parametrize(
    "other", [Stamp(0, 5, 6), Stamp(1, 4, 6), Stamp(1, 6, 6), Stamp(1, 5, 5), Stamp(1, 5, 7), Stamp(1, 0, 6)]
)
def test_a_table_of_another_stamp_is_none(other: Stamp) -> None:
    memory = Memory()
    publish(memory.box)
    assert contents(read(memory.reader, other)) is None


def test_memory_that_nobody_wrote_is_no_table_of_nobody() -> None:
    memory = Memory()
    assert contents(read(memory.reader, Stamp(SLOT, 0, 0))) is None


def test_a_request_that_is_gone_has_no_table() -> None:
    memory = Memory()
    publish(memory.box)
    memory.box.publish(Table(STAMP.gone(), [], [], []))
    assert contents(read(memory.reader)) is None


def test_each_row_is_of_its_slot() -> None:
    memory = Memory()
    publish(memory.box, Stamp(0, 3, 1), seed=2)
    publish(memory.box, Stamp(1, 4, 9), seed=3)
    tables = read(memory.reader, Stamp(1, 4, 9), Stamp(0, 3, 1))
    assert tables.bonus_keys.tolist() == [parts(STAMP, 3)[1], parts(STAMP, 2)[1]]


# ---- any words ------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-2, 6),
    st.builds(lambda k, token: k << 32 | token, st.integers(-1, 4), st.integers(0, 120)),
)
at = st.integers(0, SHAPE.cell_words - 1)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(at, words), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 110))
def test_what_comes_out_of_any_words_is_what_the_host_would_find_or_tokens_at_least(
    changes: list[tuple[int, int]], accepted: int, bonus: int
) -> None:
    memory = Memory()
    publish(memory.box)
    cell = CONTROL_WORDS + SLOT * SHAPE.cell_words
    for word_at, word in changes:
        memory.box._words[cell + word_at] = word
    table, tables = memory.box.read(SLOT), read(memory.reader)
    for k, token in [(accepted, bonus), *zip(*parts(STAMP, 1)[:2], strict=True)]:
        branch, tokens, ready = outcome_lookup(
            *(tables.accepted_keys, tables.bonus_keys, tables.drafts, tables.depth, torch.tensor([0])),
            *(torch.tensor([k], dtype=torch.int32), torch.tensor([token])),
        )
        if table is not None and table.stamp == STAMP:  # what the host believes the device finds
            found = table.find(k, token)
            assert branch.tolist() == [-1 if found is None else found]
            expected = () if found is None else table.speculation(found)
            assert tuple(tokens[0, : int(ready[0])].tolist()) == expected
        assert 0 <= int(ready[0]) <= SHAPE.num_speculative_tokens


# ---- a writer that does not wait ------------------------------------------------------------------------------------


class Hurried:
    """A tensor that lies in the mailbox: around each copy out of it the writer goes on."""

    def __init__(self, tensor: Tensor, meanwhile: Callable[[], None]) -> None:
        self._tensor, self._meanwhile = tensor, meanwhile

    def index_select(self, *arguments: Any) -> Tensor:
        self._meanwhile()
        return self._tensor.index_select(*arguments)

    def __getitem__(self, index: Any) -> Tensor:
        self._meanwhile()
        return self._tensor[index]


def stores_of(memory: Memory, tables: Sequence[tuple[Stamp, int]]) -> list[tuple[int, int]]:
    """All stores of these tables as (word, value), in the order of `Mailbox.publish`, found out on a copy.

    Between two words that tell the other side of something the q goes first, its stamp next, and the rest last.
    """
    copy = bytearray(memory.bytes)
    box = Mailbox(memoryview(copy), SHAPE)
    now, seen = (np.frombuffer(memory, np.int64, SHAPE.ring_at // 8) for memory in (copy, bytes(copy)))
    seen = seen.copy()
    q_at, stores, publish_word = SHAPE.q_at // 8, list[tuple[int, int]](), box._publish

    def rank(word: int) -> int:
        if word < q_at:
            return 2
        return int((word - q_at) % SHAPE.q_words < 3)

    def note() -> None:
        changed = [int(word) for word in np.flatnonzero(now != seen)]
        stores.extend((word, int(now[word])) for word in sorted(changed, key=rank))
        seen[:] = now

    def noted(word: int, value: int) -> None:
        note()
        publish_word(word, value)
        note()

    box._publish = noted  # type: ignore[assignment, method-assign]
    for stamp, seed in tables:
        for _ in writes(box, stamp, seed):
            pass
    return stores


def consistent(tables: Tables, q: tuple[Tensor, Tensor, Tensor] | None, branch: int) -> None:
    """What was found is one of the tables that were written, and the q is that of the drafts that are there."""
    found = contents(tables)
    if found is None:
        return
    keys, rows = found
    accepted, bonus, all_rows, all_q = parts(STAMP, seed=keys[0][1] // 10)
    assert keys == list(zip(accepted, bonus, strict=True))
    assert rows == all_rows[: len(rows)]
    if q is None or not q[2][0]:
        return
    for depth in range(len(rows)):
        assert q[0][0, depth, :3].tolist() == all_q[depth].tokens[branch].tolist()
        assert q[1][0, depth].tolist() == [*all_q[depth].probabilities[branch].tolist(), 0.0]


def read_meanwhile(steps: Sequence[int], branch: int, before: int, tables: Sequence[tuple[Stamp, int]]) -> None:
    """Read while the writer does so many stores before each of the reader's copies."""
    memory = Memory()
    for stamp, seed in tables[:before]:
        publish(memory.box, stamp, seed)
    stores = iter(stores_of(memory, tables[before:]))
    pending = iter(steps)
    live = np.frombuffer(memory.bytes, np.int64)

    def meanwhile() -> None:
        for where, value in itertools.islice(stores, next(pending, 0)):
            live[where] = value

    reader = memory.reader
    for name in ("_sequences", "_heads", "_bodies", "_q_stamps", "_q"):
        setattr(reader, name, Hurried(getattr(reader, name), meanwhile))
    found = read(reader)
    stamps = torch.tensor([[STAMP.generation, STAMP.round, int(found.version[0])]])
    q = reader.proposals(torch.tensor([SLOT]), stamps, torch.tensor([branch]))
    consistent(found, q, branch)


ANEW = [(STAMP, 1), (STAMP, 2), (STAMP, 3)]
"""A round that is begun anew twice, under its stamp: nothing but the sequence tells the tables apart."""
IN_TURN = [(Stamp(SLOT, 5, 5), 4), (STAMP, 5), (Stamp(SLOT, 5, 7), 6), (Stamp(SLOT, 5, 8), 7)]
meanwhiles = st.lists(st.integers(0, 64), min_size=7, max_size=7)


@settings(max_examples=400, deadline=None)
@given(meanwhiles, st.integers(0, 2), st.integers(0, 2), st.sampled_from([ANEW, IN_TURN]))
def test_whatever_is_written_meanwhile_a_table_is_whole_and_its_q_its_own(
    steps: list[int], branch: int, before: int, tables: list[tuple[Stamp, int]]
) -> None:
    read_meanwhile(steps, branch, before, tables)


def test_a_table_that_stands_still_is_found_in_that_way() -> None:
    """The test above would pass if nothing were ever found."""
    memory = Memory()
    publish(memory.box)
    found = read(memory.reader)
    assert contents(found) is not None
    stamps = torch.tensor([[5, 6, int(found.version[0])]])
    _, _, there = memory.reader.proposals(torch.tensor([SLOT]), stamps, torch.tensor([2]))
    assert there.tolist() == [True]


# ---- planted errors: the order of the copies -------------------------------------------------------------------------


def _no_second_look(reader: TableReader) -> None:
    kept: list[Tensor] = []

    class Once:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def index_select(self, *arguments: Any) -> Tensor:
            if not kept:
                kept.append(self.tensor.index_select(*arguments))
            return kept[0]

    reader._sequences = Once(reader._sequences)  # type: ignore[assignment]


def _depth_last(reader: TableReader) -> None:
    """The body before the head: a depth counts drafts that the copy passed by a moment too early."""
    heads, bodies, kept = reader._heads, reader._bodies, list[Tensor]()

    class Heads:
        def index_select(self, *arguments: Any) -> Tensor:
            kept.append(bodies.index_select(*arguments))
            return heads.index_select(*arguments)

    class Bodies:
        def index_select(self, *arguments: Any) -> Tensor:
            return kept.pop()

    reader._heads, reader._bodies = Heads(), Bodies()  # type: ignore[assignment]


def _head_first(reader: TableReader) -> None:
    """The head before the sequence: the depth of the table before goes with the keys of this one."""
    heads, sequences, kept = reader._heads, reader._sequences, list[Tensor]()

    class Sequences:
        def index_select(self, *arguments: Any) -> Tensor:
            if not kept:
                kept.append(heads.index_select(*arguments))
            return sequences.index_select(*arguments)

    class Heads:
        def index_select(self, *arguments: Any) -> Tensor:
            return kept[0]

    reader._heads, reader._sequences = Heads(), Sequences()  # type: ignore[assignment]


def _q_looked_at_once(reader: TableReader) -> None:
    stamps, kept = reader._q_stamps, list[Tensor]()

    class Stamps:
        def index_select(self, *arguments: Any) -> Tensor:
            if not kept:
                kept.append(stamps.index_select(*arguments))
            return kept[0]

    reader._q_stamps = Stamps()  # type: ignore[assignment]


class Everything:
    """The version that any q is of."""

    version = 0


def _q_without_version(reader: TableReader) -> None:
    stamps = reader._q_stamps

    class Stamps:
        def index_select(self, *arguments: Any) -> Tensor:
            found = stamps.index_select(*arguments).clone()
            found[:, 2] = Everything.version
            return found

    reader._q_stamps = Stamps()  # type: ignore[assignment]


PLANTS = {
    "no second look": _no_second_look,
    "depth last": _depth_last,
    "head first": _head_first,
    "q looked at once": _q_looked_at_once,
    "q without version": _q_without_version,
}


@pytest.mark.parametrize("plant", PLANTS)
def test_an_order_that_is_planted_wrong_is_found(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = TableReader.tables

    def planted_tables(self: TableReader, *arguments: Tensor) -> TableCopies:
        PLANTS[plant](self)
        found = tables(self, *arguments)
        Everything.version = int(found.before[0])
        return found

    monkeypatch.setattr(TableReader, "tables", planted_tables)
    with pytest.raises(AssertionError):
        read_in_all_ways()


def read_in_all_ways() -> None:
    """One or two of the gaps between copies let the writer do something."""
    for gap, other in itertools.combinations(range(7), 2):
        for amount, more in itertools.product(range(64), (0, 8, 100)):
            steps = [0] * 7
            steps[gap], steps[other] = amount, more
            read_meanwhile(steps, 1, 1, ANEW)
