"""The shared-memory mailbox: steps go one way through a ring, tables come back through one cell a request.

One writer and one reader on each way, neither ever waits for the other. What lies where is in `layout.py`. Nothing of
it is believed: whatever words are there, each side finds steps and tables within the shape, or none.

A cell is a sequence lock: odd while its keys are being replaced. Within a round a cell only grows: a depth is written
before the depth count says so, and its q before the depth.

The q of a speculation is wanted one verify pass after its tokens, when the table of the next round may be there
already; that of the round after it cannot be, so two cells are enough. A round may also be begun anew, with other
branches and other draws: the sequence says whose q it is.
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable
from enum import IntEnum

import numpy as np

from vllm_saguaro.messages import GONE, Proposals, Round, Stamp, Step, Table
from vllm_saguaro.placement import layout
from vllm_saguaro.placement.distribution import is_distribution
from vllm_saguaro.placement.layout import (
    CELL_HEADER,
    CONTROL_WORDS,
    Q_HEADER,
    LayoutError,
    MailboxShape,
    c_of_number,
    c_to_number,
)
from vllm_saguaro.placement.records import Records
from vllm_saguaro.placement.rounds import Rounds
from vllm_saguaro.placement.wire import UNENCODABLE, Limits, WireError, decode, encode

_HEAD, _TAIL, _STATE, _MAX_LENGTH, _ASLEEP, _DROPPED, _TAKEN, _SAMPLING_C = range(8)
_SEQUENCE, _GENERATION, _ROUND, _BRANCHES, _DEPTH, _NANOSECONDS, _KEYS = range(CELL_HEADER + 1)
_LENGTH_BYTES = 8
_NOBODY = (-1, -1, -1)
_LARGEST = 2**31 - 1
_LONGEST_ROUND = 3600 * 10**9
"""Nanoseconds: a table that says that it took longer is none."""
_MOST_WORD = 2**62 - 1
"""Counts that go up for ever begin again after it."""


class DraftState(IntEnum):
    """Where the draft side is in its life."""

    STARTING = 0
    READY = 1
    FAILED = 2


class Mailbox:
    """Both ends of the mailbox over one buffer; each process uses its half."""

    def __init__(self, buffer: memoryview, shape: MailboxShape, existing: bool = False) -> None:
        """`buffer`: at least `shape.total_bytes` writable bytes, a mailbox already or all zero; `existing`: the former.

        Raises `LayoutError` when it is too small, or a mailbox of another version or shape, or something else.
        """
        if len(buffer) < shape.total_bytes:
            raise LayoutError(f"{len(buffer)} bytes for a mailbox of {shape.total_bytes}")
        with buffer[: 8 * CONTROL_WORDS].cast("q") as control:
            if not existing and not layout.is_signed(control):
                layout.sign(control, shape)
            layout.check(control, shape)
        self.shape = shape
        self._buffer = buffer
        self._cells = buffer[: shape.tables_bytes]
        self._words = self._cells.cast("q")
        self._ring = buffer[shape.ring_at : shape.rounds_at]
        cells = np.frombuffer(self._cells, np.uint32).reshape(-1, 2)[CONTROL_WORDS:]
        tables = cells.reshape(shape.slots, shape.cell_words, 2)[:, CELL_HEADER:]
        # Of each key the token and the accepted drafts, of each draft the token and nothing.
        self._halves = tables.reshape(shape.slots, 1 + shape.num_speculative_tokens, shape.branches, 2)
        q = np.frombuffer(buffer[shape.q_at : shape.ring_at], np.int64).reshape(shape.slots, 2, shape.q_words)
        drafts = shape.slots, 2, shape.num_speculative_tokens, shape.branches, 2, shape.support
        self._q_stamps = q[..., :Q_HEADER]
        halves = q[..., Q_HEADER:].view(np.int32).reshape(drafts)
        self._q_tokens, self._q_probabilities = halves[..., 0, :], halves[..., 1, :].view(np.float32)
        self._limits = Limits(shape.slots, shape.num_speculative_tokens, shape.ring_bytes)
        # x86 keeps stores in order and loads in order by itself. Elsewhere leaving a lock and then taking it again
        # keeps what was before from what comes after.
        self._fence = threading.Lock()
        self._oldest = self._oldest_record = (-1, 0.0)
        self._records = Records(buffer, shape) if shape.device_steps else None
        self._rounds_bytes = buffer[shape.rounds_at : shape.total_bytes]
        self._rounds = Rounds(self._rounds_bytes.cast("q"), shape) if shape.rounds else None

    def close(self) -> None:
        """Let go of the buffer."""
        self._records = None
        del self._halves, self._q_stamps, self._q_tokens, self._q_probabilities
        if self._rounds is not None:
            self._rounds.close()
            self._rounds = None
        for view in (self._words, self._cells, self._ring, self._rounds_bytes, self._buffer):
            view.release()

    # ---- state of the draft side -------------------------------------------------------------------------------

    @property
    def state(self) -> DraftState:
        """Where the draft side is in its life; one that says what cannot be has failed."""
        state = self._words[_STATE]
        return DraftState(state) if 0 <= state <= DraftState.FAILED else DraftState.FAILED

    def announce(self, state: DraftState, max_length: int = 0) -> None:
        """Draft side: tell the state, and the longest text that the draft can hold."""
        self._words[_MAX_LENGTH] = max_length
        self._publish(_STATE, int(state))

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return min(max(self._words[_MAX_LENGTH], 0), _LARGEST)

    @property
    def sampling_c(self) -> float | None:
        """Target side: the newest C of Saguaro sampling that came with a table; None: none yet, or what is there is
        none.
        """
        return c_of_number(self._words[_SAMPLING_C])

    @property
    def asleep(self) -> bool:
        """Whether the draft side waits to be woken."""
        return bool(self._words[_ASLEEP])

    def fall_asleep(self, asleep: bool) -> None:
        """Draft side: say that it will wait for a wake-up, or that it is back."""
        self._publish(_ASLEEP, int(asleep))

    # ---- steps: target -> draft --------------------------------------------------------------------------------

    def post(self, step: Step) -> bool:
        """Target side: put a step into the ring. False when there is no room: nothing was written.

        The same where the two ends of the ring cannot be, and for numbers that no frame can hold.
        """
        try:
            data = encode(step)
        except UNENCODABLE:
            return False
        need = _LENGTH_BYTES + len(data) + -len(data) % 8
        tail, head = self._words[_TAIL], self._words[_HEAD]
        if head == tail or head != self._oldest[0]:
            self._oldest = head, time.monotonic()
        if not (0 <= head <= tail <= _MOST_WORD and tail - head + need <= self.shape.ring_bytes):
            return False
        self._write_ring(tail, len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        self._publish(_TAIL, tail + need)
        return True

    @property
    def stalled_seconds(self) -> float:
        """Target side: how long the oldest step has waited unread; 0.0: none waits.

        A step that became the oldest since the last call of this or of `post` counts from this call on. Two threads may
        ask: a moment in which both write down the oldest step can only shorten the time. Records that the device wrote
        count as steps: nothing of them is taken while the draft side hangs.
        """
        head = self._words[_HEAD]
        if head == self._words[_TAIL]:
            return self._stalled_records()
        if head != self._oldest[0]:
            self._oldest = head, time.monotonic()
        return time.monotonic() - self._oldest[1]

    def _stalled_records(self) -> float:
        if self._records is None:
            return 0.0
        taken, now = self._words[_TAKEN], time.monotonic()
        if taken == self._records.newest or taken != self._oldest_record[0]:
            self._oldest_record = taken, now
        return now - self._oldest_record[1]

    @property
    def from_device(self) -> bool:
        """Whether outcomes come from a device, which rings no bell."""
        return self._records is not None

    @property
    def has_step(self) -> bool:
        """Draft side: whether a step waits."""
        if self._records is not None and self._records.newest != self._records.taken:
            return True
        return self._words[_HEAD] != self._words[_TAIL]

    def receive(self) -> Step | None:
        """Draft side: the oldest step not yet seen, or None. What is no step is dropped and counted.

        What the host tells comes before what its device does: a record that was there before the ring was found empty
        speaks of requests that have come out of it.
        """
        if self._records is None:
            return self._receive_frame() if self.has_step else None
        newest = self._records.newest
        with self._fence:
            empty = self._words[_HEAD] == self._words[_TAIL]
        return self._receive_record(self._records, newest) if empty else self._receive_frame()

    def _receive_record(self, records: Records, newest: int) -> Step | None:
        before, lost = records.taken, records.lost
        step = records.take(newest)
        if records.taken != before:
            self._words[_TAKEN] = records.taken
        if records.lost != lost:
            self._drop(records.lost - lost)
        return step

    def _receive_frame(self) -> Step | None:
        """The next step of the ring, where one waits.

        All that waits is dropped when a length or the two ends of the ring cannot be: who knows where a frame begins?
        """
        head, tail = self._words[_HEAD], self._words[_TAIL]
        waiting = tail - head if 0 <= head <= tail <= head + self.shape.ring_bytes else 0
        with self._fence:
            size = int.from_bytes(self._read_ring(head, _LENGTH_BYTES), "little")
            end = head + _LENGTH_BYTES + size + -size % 8
            if not 0 < size <= waiting or end > tail:
                size, end = 0, tail
            data = self._read_ring(head + _LENGTH_BYTES, size)
        self._publish(_HEAD, end)
        try:
            return decode(data, self._limits)
        except WireError:
            self._drop()
            return None

    @property
    def dropped(self) -> int:
        """Frames that were no step, records that were lost or torn, rows of them that were nonsense."""
        return self._words[_DROPPED]

    def _drop(self, count: int = 1) -> None:
        self._words[_DROPPED] = (self._words[_DROPPED] + count) & _MOST_WORD

    # ---- tables: draft -> target -------------------------------------------------------------------------------

    def publish(self, table: Table) -> None:
        """Draft side: put a table into its request's cell: its keys when it is new, its newest depth otherwise."""
        words, shape = self._words, self.shape
        cell = CONTROL_WORDS + table.stamp.slot * shape.cell_words
        count, depth = len(table.bonus), len(table.drafts)
        if depth == 0:
            sequence = (words[cell + _SEQUENCE] + 1 | 1) & _MOST_WORD  # odd, also after a writer that did not finish
            self._publish(cell + _SEQUENCE, sequence)
            words[cell + _GENERATION] = table.stamp.generation
            words[cell + _ROUND] = table.stamp.round
            words[cell + _BRANCHES] = count
            words[cell + _DEPTH] = 0
            if table.sampling_c is not None:
                words[_SAMPLING_C] = c_to_number(table.sampling_c)
            self._q_stamps[table.stamp.slot, table.stamp.round & 1] = _NOBODY
            for branch in range(count):
                words[cell + _KEYS + branch] = table.accepted[branch] << 32 | table.bonus[branch]
            self._publish(cell + _SEQUENCE, sequence + 1)
            return
        at = cell + _KEYS + shape.branches * depth
        newest = table.drafts[-1]
        if table.newest is not None:
            self._publish_q(table.stamp, words[cell + _SEQUENCE], depth - 1, table.newest)
        words[at : at + count] = array.array("q", map(int, newest))
        words[cell + _NANOSECONDS] = int(table.seconds * 1e9)
        self._publish(cell + _DEPTH, depth)

    def read(self, slot: int) -> Table | None:
        """Target side: the table in a cell as it is now, or None while its keys are being replaced.

        None also where numbers of it cannot be: counts beyond the shape, tokens outside the vocabulary. What is
        looked at is a copy, so that nothing can change after it was found right.
        """
        words, shape = self._words, self.shape
        cell = CONTROL_WORDS + slot * shape.cell_words
        sequence = words[cell + _SEQUENCE]
        if sequence & 1:
            return None
        with self._fence:
            _, generation, round_, count, depth, nanoseconds = words[cell : cell + _KEYS].tolist()
        if not (0 <= count <= shape.branches and 0 <= depth <= shape.num_speculative_tokens):
            return None
        with self._fence:
            halves = self._halves[slot, : depth + 1, :count].copy()
        with self._fence:
            if words[cell + _SEQUENCE] != sequence:
                return None
        tokens, accepted = halves[..., 0], halves[..., 1]
        largest = np.maximum.reduce
        if (
            largest(tokens, axis=None, initial=0) >= shape.vocab_size
            or largest(accepted, axis=None, initial=0) > shape.num_speculative_tokens
            or not (generation >= 0 and round_ >= GONE and 0 <= nanoseconds <= _LONGEST_ROUND)
        ):
            return None
        bonus, *drafts = tokens.tolist()
        return Table(
            Stamp(slot, generation, round_), accepted[0].tolist(), bonus, drafts, nanoseconds / 1e9, version=sequence
        )

    def _publish_q(self, stamp: Stamp, version: int, depth: int, q: Proposals) -> None:
        count, width = q.tokens.shape
        place = stamp.slot, stamp.round & 1
        self._q_tokens[place][depth, :count, :width] = q.tokens
        self._q_probabilities[place][depth, :count, :width] = q.probabilities
        self._q_probabilities[place][depth, :count, width:] = 0
        if depth == 0:  # the rows of the depths above follow before anybody is told of them
            self._q_stamps[place] = (stamp.generation, stamp.round, version)

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """Target side: the q [depth, M] that the first drafts of a branch of this very table were drawn from.

        None where they are certain, and where the q is no longer there or no distribution: then they are to be taken as
        certain, which is exact for any draft.
        """
        if not (0 <= branch < self.shape.branches and 0 <= depth <= self.shape.num_speculative_tokens):
            return None
        place = stamp.slot, stamp.round & 1
        wanted = [stamp.generation, stamp.round, version]
        with self._fence:
            if self._q_stamps[place].tolist() != wanted:
                return None
        with self._fence:
            tokens = self._q_tokens[place][:depth, branch].copy()
            probabilities = self._q_probabilities[place][:depth, branch].copy()
        with self._fence:
            if self._q_stamps[place].tolist() != wanted:
                return None
        found = Proposals(tokens, probabilities)
        return found if is_distribution(found, self.shape.vocab_size) else None

    # ---- rounds: draft -> target, for a trace ------------------------------------------------------------------

    @property
    def note(self) -> Callable[[Round], None] | None:
        """Draft side: where its rounds are told; None: nobody asks."""
        return None if self._rounds is None else self._rounds.put

    def rounds(self) -> list[Round]:
        """Target side: the rounds since the last call; for one thread."""
        return [] if self._rounds is None else self._rounds.take()

    # ---- memory ------------------------------------------------------------------------------------------------

    def _publish(self, at: int, value: int) -> None:
        """Store a word that tells the other side that everything before it is there."""
        with self._fence:
            pass
        with self._fence:
            self._words[at] = value

    def _write_ring(self, at: int, data: bytes) -> None:
        at %= self.shape.ring_bytes
        split = min(len(data), self.shape.ring_bytes - at)
        self._ring[at : at + split] = data[:split]
        self._ring[: len(data) - split] = data[split:]

    def _read_ring(self, at: int, size: int) -> bytes:
        at %= self.shape.ring_bytes
        split = min(size, self.shape.ring_bytes - at)
        return bytes(self._ring[at : at + split]) + bytes(self._ring[: size - split])
