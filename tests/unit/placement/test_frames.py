"""Frames: what one side sends is what the other reads, however it is cut up; anything else is a `FrameError`."""

from __future__ import annotations

import contextlib
import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.placement.soundness import assert_sound_depth
from vllm_saguaro.messages import Proposals, Round, Stamp, Table, Work
from vllm_saguaro.placement import frames
from vllm_saguaro.placement.frames import (
    FrameError,
    FrameReader,
    Kind,
    TableFrames,
    decode_round,
    encode_round,
    encode_table,
)
from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.placement.meeting import VERSION

SHAPE = MailboxShape(slots=4, branches=5, num_speculative_tokens=3, ring_bytes=1 << 12, support=6, vocab_size=50)
VOCABULARY = SHAPE.vocab_size
BOUNDS = frames.bounds_of_tables(SHAPE)
HEAD = 8


@st.composite
def depths(draw: st.DrawFn) -> list[Table]:
    """A table as it grows, depth by depth."""
    tokens = st.integers(0, VOCABULARY - 1)
    count = draw(st.integers(0, SHAPE.branches))
    stamp = Stamp(draw(st.integers(0, SHAPE.slots - 1)), draw(st.integers(0, 2**31 - 1)), draw(st.integers(-1, 2**62)))
    row = st.lists(tokens, min_size=count, max_size=count)
    accepted = draw(st.lists(st.integers(0, SHAPE.num_speculative_tokens), min_size=count, max_size=count))
    bonus, drafts = draw(row), draw(st.lists(row, max_size=SHAPE.num_speculative_tokens))
    width = draw(st.integers(0, SHAPE.support))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = draw(st.none() | st.integers(0, 10_000))
    c = None if parts is None else parts / 10_000
    found = []
    for depth in range(len(drafts) + 1):
        q = None
        if width and depth:
            candidates = random.integers(0, VOCABULARY, (count, width)).astype(np.int32)
            q = Proposals(candidates, random.random((count, width), np.float32))
        found.append(Table(stamp, accepted, bonus, drafts[:depth], depth / 7, q, sampling_c=c))
    return found


@given(st.lists(depths(), max_size=4), st.lists(st.integers(1, 100), min_size=1))
def test_tables_come_as_they_went_however_the_stream_is_cut(tables: list[list[Table]], cuts: list[int]) -> None:
    sent = [table for growing in tables for table in growing]
    stream = b"".join(map(encode_table, sent))
    reader, decoder, came, at = FrameReader(BOUNDS), TableFrames(SHAPE), [], 0
    while at < len(stream):
        cut = cuts[at % len(cuts)]
        came += [decoder.decode(payload) for _, payload in reader.feed(stream[at : at + cut])]
        at += cut
    assert len(came) == len(sent)
    for found, table in zip(came, sent, strict=True):
        assert (found.stamp, len(found.bonus), len(found.drafts), found.seconds) == (
            *(table.stamp, len(table.bonus), len(table.drafts)),
            table.seconds,
        )
        if table.drafts:
            assert list(found.drafts[-1]) == table.drafts[-1]
        else:
            assert (found.accepted, found.bonus) == (table.accepted, table.bonus)
        assert found.sampling_c == table.sampling_c
        assert (found.newest is None) == (table.newest is None)
        if found.newest is not None and table.newest is not None:
            np.testing.assert_array_equal(found.newest.tokens, table.newest.tokens)
            np.testing.assert_array_equal(found.newest.probabilities, table.newest.probabilities)


@given(depths(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_spoilt_stream_gives_frames_within_bounds_or_an_error(
    growing: list[Table], spoilt: list[tuple[int, int]]
) -> None:
    stream = bytearray(b"".join(map(encode_table, growing)))
    for at, value in spoilt:
        stream[at % len(stream)] = value
    reader, decoder = FrameReader(BOUNDS), TableFrames(SHAPE)
    with contextlib.suppress(FrameError):
        for kind, payload in reader.feed(bytes(stream)):
            assert len(payload) <= BOUNDS[kind]
            if kind is Kind.TABLE:
                assert_sound_depth(decoder.decode(payload), SHAPE)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_within_bounds_or_an_error(payload: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert_sound_depth(TableFrames(SHAPE).decode(payload), SHAPE)


@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_an_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        for kind, payload in FrameReader(BOUNDS).feed(data):
            assert len(payload) <= BOUNDS[kind]


# ---- what a healthy draft side never sends --------------------------------------------------------------------------

STAMP = Stamp(2, 1, 5)
KEYS = Table(STAMP, [0, 1], [3, 4], [])


def decoded(*tables: Table) -> None:
    decoder = TableFrames(SHAPE)
    for table in tables:
        decoder.decode(encode_table(table)[HEAD:])


def test_a_healthy_table_is_taken() -> None:
    decoded(KEYS, Table(STAMP, [0, 1], [3, 4], [[7, 8]]), Table(STAMP, [0, 1], [3, 4], [[7, 8], [9, 1]]), KEYS)


@pytest.mark.parametrize(
    "wrong",
    [
        [Table(STAMP, [0, 1], [3, 4], [[7, 8]])],
        [KEYS, Table(STAMP.next(), [0, 1], [3, 4], [[7, 8]])],
        [KEYS, Table(STAMP, [0, 1], [3, 4], [[7, 8], [7, 8]])],
        [KEYS, Table(STAMP, [0], [3], [[7]])],
        [Table(Stamp(SHAPE.slots, 1, 5), [], [], [])],
        [Table(Stamp(-1, 1, 5), [], [], [])],
        [Table(Stamp(1, -1, 5), [], [], [])],
        [Table(Stamp(1, 1, -2), [], [], [])],
        [Table(STAMP, [0] * 6, [3] * 6, [])],
        [Table(STAMP, [4], [3], [])],
        [Table(STAMP, [-1], [3], [])],
        [Table(STAMP, [0], [VOCABULARY], [])],
        [Table(STAMP, [0], [-1], [])],
        [KEYS, Table(STAMP, [0, 1], [3, 4], [[7, VOCABULARY]])],
        [KEYS, Table(STAMP, [0, 1], [3, 4], [[7, -8]])],
        [Table(STAMP, [0, 1], [3, 4], [], seconds=float("nan"))],
        [Table(STAMP, [0, 1], [3, 4], [], seconds=-1.0)],
        [Table(STAMP, [0, 1], [3, 4], [], seconds=float("inf"))],
    ],
)
def test_a_table_that_cannot_be_is_refused(wrong: list[Table]) -> None:
    with pytest.raises(FrameError):
        decoded(*wrong)


@pytest.mark.parametrize("number", [10_002, 2**16 - 1])
def test_a_c_that_cannot_be_is_refused(number: int) -> None:
    payload = bytearray(encode_table(dataclasses.replace(KEYS, sampling_c=1.0))[HEAD:])
    at = frames._TABLE.size - 2
    assert struct.unpack_from("<H", payload, at) == (10_001,)
    struct.pack_into("<H", payload, at, number)
    with pytest.raises(FrameError, match="no C"):
        TableFrames(SHAPE).decode(bytes(payload))


@pytest.mark.parametrize("number", [float("nan"), -0.1, 1.1, float("inf")])
def test_a_q_that_is_no_probability_is_refused(number: float) -> None:
    q = Proposals(np.array([[1], [2]], np.int32), np.array([[1.0], [number]], np.float32))
    with pytest.raises(FrameError, match="probability"):
        decoded(KEYS, Table(STAMP, [0, 1], [3, 4], [[1, 2]], newest=q))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_candidate_that_is_no_token_is_refused(token: int) -> None:
    q = Proposals(np.array([[1], [token]], np.int32), np.array([[1.0], [1.0]], np.float32))
    with pytest.raises(FrameError):
        decoded(KEYS, Table(STAMP, [0, 1], [3, 4], [[1, 2]], newest=q))


def test_a_q_wider_than_agreed_on_is_refused() -> None:
    wide = SHAPE.support + 1
    q = Proposals(np.zeros((2, wide), np.int32), np.zeros((2, wide), np.float32))
    with pytest.raises(FrameError, match="larger"):
        decoded(KEYS, Table(STAMP, [0, 1], [3, 4], [[1, 2]], newest=q))


@pytest.mark.parametrize("more", [-1, 1])
def test_a_table_of_another_size_than_it_says_is_refused(more: int) -> None:
    payload = encode_table(KEYS)[HEAD:]
    with pytest.raises(FrameError, match="size"):
        TableFrames(SHAPE).decode(payload[:more] if more < 0 else payload + b"\0")


def test_a_frame_over_its_bound_is_refused_before_it_has_come() -> None:
    head = struct.pack("<HBBI", 0x4753, Kind.TABLE, VERSION, BOUNDS[Kind.TABLE] + 1)
    with pytest.raises(FrameError, match="most"):
        list(FrameReader(BOUNDS).feed(head))


def test_a_frame_at_its_bound_is_taken() -> None:
    payload = bytes(BOUNDS[Kind.TABLE])
    assert list(FrameReader(BOUNDS).feed(frames.pack(Kind.TABLE, payload))) == [(Kind.TABLE, payload)]


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<HBBI", 0x4754, Kind.TABLE, 1, 0),
        struct.pack("<HBBI", 0x4753, Kind.TABLE, VERSION + 1, 0),
        struct.pack("<HBBI", 0x4753, 9, VERSION, 0),
        struct.pack("<HBBI", 0x4753, Kind.STEP, VERSION, 0),
    ],
    ids=["magic", "version", "kind", "not from this side"],
)
def test_a_wrong_head_is_refused(head: bytes) -> None:
    with pytest.raises(FrameError, match="no frame"):
        list(FrameReader(BOUNDS).feed(head))


def test_the_largest_table_is_within_its_bound() -> None:
    n, m = SHAPE.branches, SHAPE.support
    q = Proposals(np.zeros((n, m), np.int32), np.zeros((n, m), np.float32))
    keys = encode_table(Table(STAMP, [0] * n, [0] * n, []))
    depth = encode_table(Table(STAMP, [0] * n, [0] * n, [[1] * n], newest=q))
    assert max(len(keys), len(depth)) == HEAD + BOUNDS[Kind.TABLE]


# ---- rounds, for a trace --------------------------------------------------------------------------------------------

TRACED = dataclasses.replace(SHAPE, rounds=8)
ROUND = Round(Work.ROUND, 1_000, 1_200, 1_300, 1_900, 3, SHAPE.branches)


def test_a_round_of_another_node_ends_when_it_is_heard_of() -> None:
    """The other node has another clock; how long everything took is the same by both."""
    ((kind, payload),) = FrameReader(frames.bounds_of_tables(TRACED)).feed(encode_round(ROUND))
    assert kind is Kind.ROUND
    expected = dataclasses.replace(ROUND, began=9_000_100, glued=9_000_300, forked=9_000_400, ended=9_001_000)
    assert decode_round(payload, TRACED, now=9_001_000) == expected


def test_rounds_come_only_where_a_trace_is_asked_for() -> None:
    with pytest.raises(FrameError, match="no frame that may come here"):
        list(FrameReader(BOUNDS).feed(encode_round(ROUND)))


@pytest.mark.parametrize("wrong", [{"work": 0}, {"branches": SHAPE.branches + 1}, {"glued": 999}, {"rows": -1}])
def test_a_round_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    payload = encode_round(dataclasses.replace(ROUND, **wrong))[HEAD:]  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="a round that cannot be"):
        decode_round(payload, TRACED, now=9_001_000)


@given(st.binary(max_size=100) | st.binary(min_size=56, max_size=56))
def test_any_bytes_are_a_round_or_an_error(payload: bytes) -> None:
    with contextlib.suppress(FrameError):
        found = decode_round(payload, TRACED, now=10**15)
        assert found.began <= found.glued <= found.forked <= found.ended == 10**15
        assert 0 <= found.branches <= SHAPE.branches
