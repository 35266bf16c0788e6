"""The shared-memory mailbox: steps go one way through a ring, tables come back through one cell a request.

One writer and one reader on each way, neither ever waits for the other. The memory is anonymous (a memfd, passed on by
inheritance), so no name is left in /dev/shm however the two processes end. Layout, in 64-bit words:

    control  [16]               head and tail of the ring, state of the draft side, its maximum length
    tables   [slots][cell]      sequence, generation, round, branches, depth, nanoseconds, keys [N], drafts [K][N]
    ring     [ring_bytes]       frames: length (8 bytes), then the step as `wire` encodes it, padded to 8

A cell is a sequence lock: odd while its keys are being replaced. Within a round a cell only grows: a depth is written
before the depth count says so.
"""

from __future__ import annotations

import array
import threading
from dataclasses import dataclass
from enum import IntEnum

from vllm_saguaro.messages import Stamp, Step, Table
from vllm_saguaro.placement.wire import WireError, decode, encode

_CONTROL_WORDS = 16
_HEAD, _TAIL, _STATE, _MAX_LENGTH, _ASLEEP, _DROPPED = range(6)
_SEQUENCE, _GENERATION, _ROUND, _BRANCHES, _DEPTH, _NANOSECONDS, _KEYS = range(7)
_LENGTH_BYTES = 8


class DraftState(IntEnum):
    """Where the draft side is in its life."""

    STARTING = 0
    READY = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class MailboxShape:
    """What both sides must agree on. `ring_bytes` is a multiple of 8."""

    slots: int
    branches: int
    num_speculative_tokens: int
    ring_bytes: int

    @property
    def cell_words(self) -> int:
        """64-bit words of one table."""
        return _KEYS + self.branches * (1 + self.num_speculative_tokens)

    @property
    def total_bytes(self) -> int:
        """Size of the whole mailbox."""
        return 8 * (_CONTROL_WORDS + self.slots * self.cell_words) + self.ring_bytes


class Mailbox:
    """Both ends of the mailbox over one buffer; each process uses its half."""

    def __init__(self, buffer: memoryview, shape: MailboxShape) -> None:
        """`buffer`: at least `shape.total_bytes` writable bytes, all zero when first used."""
        self.shape = shape
        ring_at = shape.total_bytes - shape.ring_bytes
        self._buffer = buffer
        self._cells = buffer[:ring_at]
        self._words = self._cells.cast("q")
        self._ring = buffer[ring_at : shape.total_bytes]
        # x86 keeps stores in order and loads in order by itself. Elsewhere leaving a lock and then taking it again
        # keeps what was before from what comes after.
        self._fence = threading.Lock()

    def close(self) -> None:
        """Let go of the buffer."""
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
        if need > self.shape.ring_bytes - (tail - head):
            return False
        self._write_ring(tail, len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        self._publish(_TAIL, tail + need)
        return True

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
            for branch in range(count):
                words[cell + _KEYS + branch] = table.accepted[branch] << 32 | table.bonus[branch]
            self._publish(cell + _SEQUENCE, sequence + 2)
            return
        at = cell + _KEYS + shape.branches * depth
        newest = table.drafts[-1]
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
        return Table(stamp, [key >> 32 for key in keys], [key & 0xFFFFFFFF for key in keys], rows, nanoseconds / 1e9)

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
