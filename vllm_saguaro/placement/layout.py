"""The layout of a mailbox: what lies where, and the words by which each side sees that the other has it alike.

In 64-bit words:

    control  [24]               head and tail of the ring, state of the draft side, its maximum length, C of Saguaro
                                sampling (word 7); from word 8 on magic and version, and the sizes of `MailboxShape`
    tables   [slots][cell]      sequence, generation, round, branches, depth, nanoseconds, keys [N], drafts [K][N]
    device   [8]                number of the newest record; `device` and `records` are written by the target's device
                                alone (`records.py`), and absent without `device_steps`
    records  [steps][record]    number of the step, rows, checksum; then of each row [slots] its slot, generation,
                                round, accepted, verified, bonus, length, ready and drafts [K]
    q        [slots][2][cell]   generation, round, sequence; then of each draft [K][N] its M candidates (32 bits each),
                                and their probabilities (float32). Rounds take turns between the two
    ring     [ring_bytes]       frames: length (8 bytes), then the step as `wire` encodes it, padded to 8
    rounds   [1 + rounds * 8]   number of the newest; then of each its number, and what `rounds.py` says of it. For a
                                trace alone; absent without `rounds`
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

CONTROL_WORDS = 24
CELL_HEADER = 6
Q_HEADER = 3
DEVICE_WORDS = 8
RECORD_HEADER = 3
ROW_HEADER = 8
ROUND_WORDS = 8
_SIGNATURE, _SIZES = 8, 9
_MAGIC = 0x53474D42  # "SGMB"
_VERSION = 5
"""Version 1 had no magic, version 2 no records, version 3 no rounds, version 4 no C."""
_PARTS = 10_000
MOST_C = 1 + _PARTS
"""The largest number that stands for a C: it is 1."""


class LayoutError(ValueError):
    """The memory is no mailbox of this version and shape."""


@dataclass(frozen=True, slots=True)
class MailboxShape:
    """What both sides must agree on. `ring_bytes` is a multiple of 8; `support` is M, the candidates of a draft's q.

    `vocab_size` is the target's: a table with a token id that is not below it does not exist for the reader. Pages of
    the q area are touched only when used: at temperature 0 they cost no memory. `device_steps`: how many records of
    steps of the target's device there is room for; 0: its outcomes come through the ring. `rounds`: how many rounds of
    the draft side there is room for until they are read; 0: nobody asks. Raises `ValueError` for other numbers.
    """

    slots: int
    branches: int
    num_speculative_tokens: int
    ring_bytes: int
    support: int
    vocab_size: int = 2**31
    device_steps: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("device_steps", "rounds") else 1
            if type(value) is not int or not least <= value <= 2**31:
                raise ValueError(f"a mailbox with {name} {value!r}: give a whole number from {least} to 2**31")
        if self.ring_bytes % 8:
            raise ValueError(f"a mailbox with ring_bytes {self.ring_bytes}: give a multiple of 8")

    @property
    def cell_words(self) -> int:
        """64-bit words of one table."""
        return CELL_HEADER + self.branches * (1 + self.num_speculative_tokens)

    @property
    def q_words(self) -> int:
        """64-bit words of one table's q."""
        return Q_HEADER + self.branches * self.num_speculative_tokens * self.support

    @property
    def row_words(self) -> int:
        """64-bit words of one row of a record."""
        return ROW_HEADER + self.num_speculative_tokens

    @property
    def record_words(self) -> int:
        """64-bit words of the record of one step."""
        return RECORD_HEADER + self.slots * self.row_words

    @property
    def tables_bytes(self) -> int:
        """Size of the control words and the tables."""
        return 8 * (CONTROL_WORDS + self.slots * self.cell_words)

    @property
    def q_at(self) -> int:
        """Where the q area begins, in bytes: behind the tables, and the records where there are any."""
        records = DEVICE_WORDS + self.device_steps * self.record_words if self.device_steps else 0
        return self.tables_bytes + 8 * records

    @property
    def ring_at(self) -> int:
        """Where the ring begins, in bytes."""
        return self.q_at + 8 * self.slots * 2 * self.q_words

    @property
    def rounds_at(self) -> int:
        """Where the rounds begin, in bytes."""
        return self.ring_at + self.ring_bytes

    @property
    def total_bytes(self) -> int:
        """Size of the whole mailbox."""
        return self.rounds_at + (8 * (1 + self.rounds * ROUND_WORDS) if self.rounds else 0)


def c_to_number(c: float | None) -> int:
    """How a C of Saguaro sampling from 0 to 1 crosses: 0 for none, else one more than its ten-thousandths."""
    return 0 if c is None else 1 + round(c * _PARTS)


def c_of_number(number: int) -> float | None:
    """The C that a number stands for; None for 0, and for numbers that stand for no C."""
    return (number - 1) / _PARTS if 0 < number <= MOST_C else None


def sign(words: memoryview, shape: MailboxShape) -> None:
    """Say in the control words (64 bits each) of memory that is all zero what it is to be."""
    for at, size in enumerate(dataclasses.astuple(shape), start=_SIZES):
        words[at] = size
    words[_SIGNATURE] = _MAGIC << 16 | _VERSION


def is_signed(words: memoryview) -> bool:
    """Whether the memory has been made into anything yet."""
    return words[_SIGNATURE] != 0


def check(words: memoryview, shape: MailboxShape) -> None:
    """Raises `LayoutError` unless the control words say that this is a mailbox of this version and shape."""
    magic, version = words[_SIGNATURE] >> 16, words[_SIGNATURE] & 0xFFFF
    if magic != _MAGIC:
        raise LayoutError(f"no mailbox there: magic {magic & (1 << 48) - 1:#x} instead of {_MAGIC:#x}")
    if version != _VERSION:
        raise LayoutError(
            f"a mailbox of layout {version}, and here is layout {_VERSION}: give both sides the same vllm_saguaro"
        )
    ours = dataclasses.asdict(shape)
    theirs = dict(zip(ours, words[_SIZES : _SIZES + len(ours)].tolist(), strict=True))
    differing = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if differing:
        raise LayoutError(f"a mailbox of another shape: {', '.join(differing)}")
