"""The records of steps that the target's device writes, as the draft side reads them: only what is sound is believed.

A record is put where it belongs (its number modulo the room there is) by one asynchronous copy, and the number of the
newest one by a second copy after it on the same stream. Nobody waits for the reader: one that is slower than the room
lasts loses records. So each says its own number and has a checksum over all of it: a record that is overwritten while
it is read, or was before, is none. The checksum also makes it indifferent whether the bytes of the two copies become
visible in their order, which CUDA promises to those alone who wait for the stream.
"""

from __future__ import annotations

import numpy as np

from vllm_saguaro.messages import Outcome, Stamp, Step
from vllm_saguaro.placement.layout import CONTROL_WORDS, DEVICE_WORDS, RECORD_HEADER, MailboxShape

NUMBER, ROWS, CHECKSUM = range(RECORD_HEADER)
SLOT, GENERATION, ROUND, ACCEPTED, VERIFIED, BONUS, LENGTH, READY, DRAFTS = range(9)
"""Columns of a row; the drafts begin at the last."""
NEWEST = 0
"""Of the words of the `device` part of the layout."""
_NUMBER_WEIGHT, _ROWS_WEIGHT = 0x9E3779B97F4A7C15 - 2**64, 0x6A09E667F3BCC909
_LARGEST = 2**31 - 1
_MOST_WORD = 2**62 - 1


def weights(count: int) -> np.ndarray:
    """What each of the first `count` words of the rows counts for in the checksum [count] int64.

    Odd numbers, so that no change of a single word goes unseen, and all different, so that no two may change places.
    """
    return (2 * np.arange(count, dtype=np.int64) + 1) * 0x2545F491


def head_weight(number: int, rows: int) -> int:
    """What the header adds to the checksum, as a signed 64-bit number."""
    total = (number * _NUMBER_WEIGHT + rows * _ROWS_WEIGHT) & (2**64 - 1)
    return total - 2**64 if total >= 2**63 else total


class Records:
    """The reading half: each record once, in order, as a `Step` of outcomes."""

    def __init__(self, buffer: memoryview, shape: MailboxShape) -> None:
        """`buffer`: the whole mailbox, of a shape that has records."""
        at = CONTROL_WORDS + shape.slots * shape.cell_words
        words = np.frombuffer(buffer, np.int64, shape.q_at // 8)[at:]
        self._shape = shape
        self._head = words[:DEVICE_WORDS]
        self._ring = words[DEVICE_WORDS:].reshape(shape.device_steps, shape.record_words)
        self._weights = weights(shape.slots * shape.row_words)
        self.taken = 0
        """Number of the last record that was taken or passed over."""
        self.lost = 0
        """Records that were not there any more, torn, or nonsense; and rows that were nonsense."""

    @property
    def newest(self) -> int:
        """Number of the newest record, the first being 1; that of the last taken where what is there cannot be."""
        newest = int(self._head[NEWEST])
        return newest if 0 <= newest <= _MOST_WORD else self.taken

    def take(self, newest: int) -> Step | None:
        """The oldest record that was not taken yet, up to number `newest`; None: there is none, or it was lost."""
        if newest == self.taken:
            return None
        number = self.taken + 1
        behind = newest - self.taken
        if not 0 < behind <= self._shape.device_steps:
            # Overtaken, or the count jumped: what is still there is looked at, whatever it is.
            number = max(newest - self._shape.device_steps, 0) + 1
            self.lost += max(min(number - self.taken - 1, _LARGEST), 1)
        self.taken = number
        record = self._ring[number % self._shape.device_steps]
        step = self._sound(number, record)
        self.lost += step is None
        return step

    def _sound(self, number: int, record: np.ndarray) -> Step | None:
        count = int(record[ROWS])
        if not 0 < count <= self._shape.slots:
            return None
        size = count * self._shape.row_words
        copy = record[: RECORD_HEADER + size].copy()
        rows = copy[RECORD_HEADER:]
        with np.errstate(over="ignore"):
            checksum = int(np.add.reduce(rows * self._weights[:size]) + np.int64(head_weight(number, count)))
        if copy[NUMBER] != number or copy[ROWS] != count or copy[CHECKSUM] != checksum:
            return None
        step, seen = Step(), set[int]()
        for row in rows.reshape(count, -1).tolist():
            if row[GENERATION] <= 0 or row[ACCEPTED] < 0:  # nobody's, or no outcome
                continue
            outcome = self._outcome(row)
            if outcome is None or outcome.stamp.slot in seen:
                self.lost += 1
                continue
            seen.add(outcome.stamp.slot)
            step.outcomes.append(outcome)
        return step

    def _outcome(self, row: list[int]) -> Outcome | None:
        shape = self._shape
        most, ready = shape.num_speculative_tokens, row[READY]
        if not (
            0 <= row[SLOT] < shape.slots
            and row[GENERATION] <= _LARGEST
            and 0 <= row[ROUND] <= _MOST_WORD
            and 0 <= row[ACCEPTED] <= row[VERIFIED] <= most
            and 0 <= row[BONUS] < shape.vocab_size
            and 0 <= row[LENGTH] <= _LARGEST
            and 0 <= ready <= most
        ):
            return None
        drafts = tuple(row[DRAFTS : DRAFTS + ready])
        if not all(0 <= token < shape.vocab_size for token in drafts):
            return None
        stamp = Stamp(row[SLOT], row[GENERATION], row[ROUND])
        return Outcome(stamp, row[ACCEPTED], row[BONUS], row[LENGTH], drafts, row[VERIFIED])
