"""What crosses the network link, as bytes: frames of a fixed little-endian layout, and a reader that trusts nothing.

    frame    magic (16 bits), kind (8), version (8), length of what follows (32)

    STEP     target to draft: a step as `wire` encodes it
    STATE    draft to target: state (32 bits), longest text (32)
    TAKEN    draft to target: how many steps the draft side has taken so far (64)
    TABLE    draft to target: one depth of a table (`TableFrames`)
    ROUND    draft to target: a round that has ended, as `rounds.py` has it (7 x 64); where a trace is asked for

Every kind has a bound for its length, from the shape of the mailbox. What is beyond it, or has another magic, version
or kind, is a `FrameError`: after it nothing of the stream means anything.
"""

from __future__ import annotations

import array
import dataclasses
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum

import numpy as np

from vllm_saguaro.messages import GONE, Proposals, Round, Stamp, Table
from vllm_saguaro.placement.layout import MOST_C, MailboxShape, c_of_number, c_to_number
from vllm_saguaro.placement.meeting import VERSION
from vllm_saguaro.placement.rounds import round_of

_MAGIC = 0x4753  # "SG"
_HEADER = struct.Struct("<HBBI")
_TABLE = struct.Struct("<iiqdHHHH")  # slot, generation, round, seconds, branches, depth, candidates of q, C
STATE = struct.Struct("<ii")
TAKEN = struct.Struct("<q")
_ROUND = struct.Struct("<7q")


class Kind(IntEnum):
    """What a frame holds."""

    STEP = 1
    STATE = 2
    TAKEN = 3
    TABLE = 4
    ROUND = 5


class FrameError(ValueError):
    """Bytes that are no frame of this link, or a frame that cannot be true."""


def pack(kind: Kind, payload: bytes) -> bytes:
    """A frame."""
    return _HEADER.pack(_MAGIC, kind, VERSION, len(payload)) + payload


def bounds_of_steps(shape: MailboxShape) -> dict[int, int]:
    """What the target side may send, and how long it may be: no step is longer than the ring would hold."""
    return {Kind.STEP: shape.ring_bytes}


def bounds_of_tables(shape: MailboxShape) -> dict[int, int]:
    """What the draft side may send, and how long it may be."""
    bounds: dict[int, int] = {
        Kind.STATE: STATE.size,
        Kind.TAKEN: TAKEN.size,
        Kind.TABLE: _TABLE.size + shape.branches * max(8, 4 + 8 * shape.support),
    }
    if shape.rounds:
        bounds[Kind.ROUND] = _ROUND.size
    return bounds


class FrameReader:
    """Cuts a stream into frames."""

    def __init__(self, bounds: Mapping[int, int]) -> None:
        """`bounds`: the kinds that may come, and the longest of each in bytes."""
        self._bounds = bounds
        self._held = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Kind, bytes]]:
        """The frames that are complete with these bytes. Raises `FrameError` at the first that is none."""
        held = self._held
        held += data
        at = 0
        while len(held) - at >= _HEADER.size:
            magic, kind, version, size = _HEADER.unpack_from(held, at)
            if (magic, version) != (_MAGIC, VERSION) or kind not in self._bounds:
                raise FrameError(f"magic {magic:#x}, version {version}, kind {kind}: no frame that may come here")
            if size > self._bounds[kind]:
                raise FrameError(f"a frame of kind {kind} of {size} bytes: {self._bounds[kind]} are the most")
            if len(held) - at < _HEADER.size + size:
                break
            start, at = at + _HEADER.size, at + _HEADER.size + size
            yield Kind(kind), bytes(held[start:at])
        del held[:at]


def encode_round(one: Round) -> bytes:
    """A round as a frame."""
    return pack(Kind.ROUND, _ROUND.pack(*dataclasses.astuple(one)))


def decode_round(payload: bytes, shape: MailboxShape, now: int) -> Round:
    """The round in a frame that came at `now`, in nanoseconds: its end.

    The other node has another clock: what is true of its times is how long everything took. Raises `FrameError`.
    """
    try:
        one = round_of(list(_ROUND.unpack(payload)), shape.branches)
    except struct.error as error:
        raise FrameError(str(error)) from None
    if one is None:
        raise FrameError("a round that cannot be")
    later = now - one.ended
    began, glued, forked = (at + later for at in (one.began, one.glued, one.forked))
    return dataclasses.replace(one, began=began, glued=glued, forked=forked, ended=now)


def encode_table(table: Table) -> bytes:
    """One depth of a table as a frame: its keys when it is new (depth 0), its newest drafts and their q otherwise.

    Then follow, in 32 bits each: k and t* of every branch; or the token of every branch, and the candidates [N, M] and
    their probabilities [N, M] where there is a q.
    """
    stamp, count, depth = table.stamp, len(table.bonus), len(table.drafts)
    q = table.newest if depth else None
    width = q.tokens.shape[1] if q is not None else 0
    rows = (table.drafts[-1],) if depth else (table.accepted, table.bonus)
    c = c_to_number(table.sampling_c)
    parts = [_TABLE.pack(stamp.slot, stamp.generation, stamp.round, table.seconds, count, depth, width, c)]
    parts += [array.array("i", map(int, row)).tobytes() for row in rows]
    if q is not None:
        parts += [q.tokens.astype("<i4").tobytes(), q.probabilities.astype("<f4").tobytes()]
    return pack(Kind.TABLE, b"".join(parts))


@dataclasses.dataclass(slots=True)
class _Growing:
    stamp: Stamp
    count: int
    depth: int


class TableFrames:
    """Reads the depths of tables, in their order, and takes none that a healthy draft side would not send."""

    def __init__(self, shape: MailboxShape) -> None:
        self._shape = shape
        self._growing: dict[int, _Growing] = {}

    def decode(self, payload: bytes) -> Table:
        """The depth in a frame, fit for `Mailbox.publish`: `drafts` is as long as the table is deep, and its last entry
        is the newest.

        Raises `FrameError`.
        """
        if len(payload) < _TABLE.size:
            raise FrameError("a table without a head")
        slot, generation, round_, seconds, count, depth, width, c = _TABLE.unpack_from(payload)
        shape = self._shape
        if not (0 <= slot < shape.slots and generation >= 0 and round_ >= GONE):
            raise FrameError("a table of no slot")
        if count > shape.branches or depth > shape.num_speculative_tokens or width > shape.support:
            raise FrameError("a table larger than agreed on")
        if not 0 <= seconds < 1e6:
            raise FrameError("a table of no time")
        if c > MOST_C:
            raise FrameError("a table of no C")
        stamp = Stamp(slot, generation, round_)
        rest = 4 * count * (1 + 2 * width) if depth else 8 * count
        if len(payload) != _TABLE.size + rest or (width and not depth):
            raise FrameError("a table of another size than it says")
        values = np.frombuffer(payload, "<i4", offset=_TABLE.size)
        if depth == 0:
            accepted, bonus = values[:count], values[count:]
            self._check(accepted, shape.num_speculative_tokens + 1)
            self._check(bonus, self._shape.vocab_size)
            self._growing[slot] = _Growing(stamp, count, 0)
            return Table(stamp, accepted.tolist(), bonus.tolist(), [], seconds, sampling_c=c_of_number(c))
        table = self._growing.get(slot)
        if table is None or (table.stamp, table.count, table.depth + 1) != (stamp, count, depth):
            raise FrameError("a depth of a table that was not begun")
        tokens = values[:count]
        self._check(tokens, self._shape.vocab_size)
        q = self._proposals(values[count:], count, width) if width else None
        table.depth = depth
        drafts = [tokens] * depth  # only the last one is looked at
        return Table(stamp, range(count), range(count), drafts, seconds, q, sampling_c=c_of_number(c))

    def _proposals(self, values: np.ndarray, count: int, width: int) -> Proposals:
        candidates, probabilities = values.reshape(2, count, width)
        self._check(candidates, self._shape.vocab_size)
        q = probabilities.view("<f4")
        if not ((q >= 0) & (q <= 1.001)).all():  # also false for "not a number"
            raise FrameError("a q that is no probability")
        return Proposals(candidates, q)

    @staticmethod
    def _check(values: np.ndarray, end: int) -> None:
        if len(values) and not (values.min() >= 0 and values.max() < end):
            raise FrameError(f"a number that is not from 0 to {end - 1}")
