"""The shared-memory mailbox: steps go one way through a ring, tables come back through one cell a request.

One writer and one reader on each way, neither ever waits for the other. The memory is anonymous (a memfd, passed on by
inheritance), so no name is left in /dev/shm however the two processes end. Layout, in 64-bit words:

    control  [16]               head and tail of the ring, state of the draft side, its maximum length
    tables   [slots][cell]      sequence, generation, round, branches, depth, nanoseconds, keys [N], drafts [K][N]
    q        [slots][2][cell]   generation, round, sequence; then of each draft [K][N] its M candidates (32 bits each),
                                and their probabilities (float32). Rounds take turns between the two
    ring     [ring_bytes]       frames: length (8 bytes), then the step as `wire` encodes it, padded to 8

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
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vllm_saguaro.messages import Proposals, Stamp, Step, Table
from vllm_saguaro.placement.wire import WireError, decode, encode

_CONTROL_WORDS = 16
_HEAD, _TAIL, _STATE, _MAX_LENGTH, _ASLEEP, _DROPPED = range(6)
_SEQUENCE, _GENERATION, _ROUND, _BRANCHES, _DEPTH, _NANOSECONDS, _KEYS = range(7)
_LENGTH_BYTES = 8
_Q_HEADER = 3
_NOBODY = (-1, -1, -1)


class DraftState(IntEnum):
    """Where the draft side is in its life."""

    STARTING = 0
    READY = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class MailboxShape:
    """What both sides must agree on. `ring_bytes` is a multiple of 8; `support` is M, the candidates of a draft's q.

    Pages of the q area are touched only when used: at temperature 0 they cost no memory.
    """

    slots: int
    branches: int
    num_speculative_tokens: int
    ring_bytes: int
    support: int

    @property
    def cell_words(self) -> int:
        """64-bit words of one table."""
        return _KEYS + self.branches * (1 + self.num_speculative_tokens)

    @property
    def q_words(self) -> int:
        """64-bit words of one table's q."""
        return _Q_HEADER + self.branches * self.num_speculative_tokens * self.support

    @property
    def tables_bytes(self) -> int:
        """Size of the control words and the tables."""
        return 8 * (_CONTROL_WORDS + self.slots * self.cell_words)

    @property
    def total_bytes(self) -> int:
        """Size of the whole mailbox."""
        return self.tables_bytes + 8 * self.slots * 2 * self.q_words + self.ring_bytes


class Mailbox:
    """Both ends of the mailbox over one buffer; each process uses its half."""

    def __init__(self, buffer: memoryview, shape: MailboxShape) -> None:
        """`buffer`: at least `shape.total_bytes` writable bytes, all zero when first used."""
        self.shape = shape
        ring_at = shape.total_bytes - shape.ring_bytes
        self._buffer = buffer
        self._cells = buffer[: shape.tables_bytes]
        self._words = self._cells.cast("q")
        self._ring = buffer[ring_at : shape.total_bytes]
        q = np.frombuffer(buffer[shape.tables_bytes : ring_at], np.int64).reshape(shape.slots, 2, shape.q_words)
        drafts = shape.slots, 2, shape.num_speculative_tokens, shape.branches, 2, shape.support
        self._q_stamps = q[..., :_Q_HEADER]
        halves = q[..., _Q_HEADER:].view(np.int32).reshape(drafts)
        self._q_tokens, self._q_probabilities = halves[..., 0, :], halves[..., 1, :].view(np.float32)
        # x86 keeps stores in order and loads in order by itself. Elsewhere leaving a lock and then taking it again
        # keeps what was before from what comes after.
        self._fence = threading.Lock()
        self._oldest = (-1, 0.0)

    def close(self) -> None:
        """Let go of the buffer."""
        del self._q_stamps, self._q_tokens, self._q_probabilities
        for view in (self._words, self._cells, self._ring, self._buffer):
            view.release()

    # ---- state of the draft side -------------------------------------------------------------------------------

    @property
    def state(self) -> DraftState:
        """Where the draft side is in its life."""
        return DraftState(self._words[_STATE])

    def announce(self, state: DraftState, max_length: int = 0) -> None:
        """Draft side: tell the state, and the longest text that the draft can hold."""
        self._words[_MAX_LENGTH] = max_length
        self._publish(_STATE, int(state))

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return self._words[_MAX_LENGTH]

    @property
    def asleep(self) -> bool:
        """Whether the draft side waits to be woken."""
        return bool(self._words[_ASLEEP])

    def fall_asleep(self, asleep: bool) -> None:
        """Draft side: say that it will wait for a wake-up, or that it is back."""
        self._publish(_ASLEEP, int(asleep))

    # ---- steps: target -> draft --------------------------------------------------------------------------------

    def post(self, step: Step) -> bool:
        """Target side: put a step into the ring. False when there is no room: nothing was written."""
        data = encode(step)
        need = _LENGTH_BYTES + len(data) + -len(data) % 8
        tail, head = self._words[_TAIL], self._words[_HEAD]
        if head == tail or head != self._oldest[0]:
            self._oldest = head, time.monotonic()
        if need > self.shape.ring_bytes - (tail - head):
            return False
        self._write_ring(tail, len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        self._publish(_TAIL, tail + need)
        return True

    @property
    def stalled_seconds(self) -> float:
        """Target side: how long the oldest step has waited unread; 0.0: none waits.

        A step that became the oldest since the last call of this or of `post` counts from this call on. Two threads may
        ask: a moment in which both write down the oldest step can only shorten the time.
        """
        head = self._words[_HEAD]
        if head == self._words[_TAIL]:
            return 0.0
        if head != self._oldest[0]:
            self._oldest = head, time.monotonic()
        return time.monotonic() - self._oldest[1]

    @property
    def has_step(self) -> bool:
        """Draft side: whether a step waits."""
        return self._words[_HEAD] != self._words[_TAIL]

    def receive(self) -> Step | None:
        """Draft side: the oldest step not yet seen, or None. A frame that is no step is dropped and counted."""
        head, tail = self._words[_HEAD], self._words[_TAIL]
        if head == tail:
            return None
        with self._fence:
            size = int.from_bytes(self._read_ring(head, _LENGTH_BYTES), "little")
            if not 0 < size <= tail - head - _LENGTH_BYTES:
                self._words[_HEAD], self._words[_DROPPED] = tail, self._words[_DROPPED] + 1
                return None
            data = self._read_ring(head + _LENGTH_BYTES, size)
        self._publish(_HEAD, head + _LENGTH_BYTES + size + -size % 8)
        try:
            return decode(data)
        except WireError:
            self._words[_DROPPED] += 1
            return None

    @property
    def dropped(self) -> int:
        """Frames that were no step."""
        return self._words[_DROPPED]

    # ---- tables: draft -> target -------------------------------------------------------------------------------

    def publish(self, table: Table) -> None:
        """Draft side: put a table into its request's cell: its keys when it is new, its newest depth otherwise."""
        words, shape = self._words, self.shape
        cell = _CONTROL_WORDS + table.stamp.slot * shape.cell_words
        count, depth = len(table.bonus), len(table.drafts)
        if depth == 0:
            sequence = words[cell + _SEQUENCE]
            self._publish(cell + _SEQUENCE, sequence + 1)
            words[cell + _GENERATION] = table.stamp.generation
            words[cell + _ROUND] = table.stamp.round
            words[cell + _BRANCHES] = count
            words[cell + _DEPTH] = 0
            self._q_stamps[table.stamp.slot, table.stamp.round & 1] = _NOBODY
            for branch in range(count):
                words[cell + _KEYS + branch] = table.accepted[branch] << 32 | table.bonus[branch]
            self._publish(cell + _SEQUENCE, sequence + 2)
            return
        at = cell + _KEYS + shape.branches * depth
        newest = table.drafts[-1]
        if table.newest is not None:
            self._publish_q(table.stamp, words[cell + _SEQUENCE], depth - 1, table.newest)
        words[at : at + count] = array.array("q", map(int, newest))
        words[cell + _NANOSECONDS] = int(table.seconds * 1e9)
        self._publish(cell + _DEPTH, depth)

    def read(self, slot: int) -> Table | None:
        """Target side: the table in a cell as it is now, or None while its keys are being replaced."""
        words, shape = self._words, self.shape
        cell = _CONTROL_WORDS + slot * shape.cell_words
        sequence = words[cell + _SEQUENCE]
        if sequence & 1:
            return None
        with self._fence:
            _, generation, round_, count, depth, nanoseconds = words[cell : cell + _KEYS].tolist()
        with self._fence:
            at, stride = cell + _KEYS, shape.branches
            keys = words[at : at + count].tolist()
            rows = [words[row : row + count].tolist() for row in range(at + stride, at + stride * (depth + 1), stride)]
        with self._fence:
            if words[cell + _SEQUENCE] != sequence:
                return None
        stamp = Stamp(slot, generation, round_)
        accepted, bonus = [key >> 32 for key in keys], [key & 0xFFFFFFFF for key in keys]
        return Table(stamp, accepted, bonus, rows, nanoseconds / 1e9, version=sequence)

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

        None where they are certain, and where the q is no longer there: then they are to be taken as certain, which is
        exact for any draft.
        """
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
        return Proposals(tokens, probabilities)

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
