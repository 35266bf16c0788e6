"""The draft side's end of the network link. It has no threads: its loop looks at the socket between any two forwards.

What waits to be sent is bounded by construction: a new table of a slot takes the place of whatever has not been sent of
that slot's tables before, so a slow network makes tables late and never old.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from vllm_saguaro.messages import Round, Step, Table
from vllm_saguaro.placement import frames
from vllm_saguaro.placement.draft_end import SLEEP_MILLISECONDS, YIELD_SECONDS, TargetGone
from vllm_saguaro.placement.frames import FrameError, FrameReader, Kind, encode_round, encode_table
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import DraftState
from vllm_saguaro.placement.meeting import Invitation, knock
from vllm_saguaro.placement.network import watch_closely
from vllm_saguaro.placement.wire import Limits, WireError, decode

_READ_BYTES = 1 << 16
_SEND_BYTES = 1 << 18
"""Tables are joined up to about this size for one call of the system."""


class FarMailbox:
    """The draft side's half of a mailbox whose other half is on another node."""

    def __init__(self, connection: socket.socket, shape: MailboxShape) -> None:
        self.shape = shape
        self.dropped = 0
        """Steps that did not decode."""
        self.from_device = False
        """No device of the target's node reaches this one."""
        self._connection = connection
        self._connection.setblocking(False)
        self._reader = FrameReader(frames.bounds_of_steps(shape))
        self._limits = Limits(shape.slots, shape.num_speculative_tokens, shape.ring_bytes)
        self._steps: deque[bytes] = deque()
        self._taken = self._told = 0
        self._states: list[bytes] = []
        self._tables: dict[int, list[bytes]] = {}
        self._rounds: deque[bytes] = deque(maxlen=shape.rounds)
        self._unsent = memoryview(b"")

    def receive(self) -> Step | None:
        """The oldest step not yet seen, or None. One that does not decode is dropped and counted."""
        if not self._steps:
            self._read()
        step = None
        while self._steps and step is None:
            self._taken += 1
            try:
                step = decode(self._steps.popleft(), self._limits)
            except WireError:
                self.dropped += 1
        self.flush()
        return step

    def publish(self, table: Table) -> None:
        """Send a table's keys when it is new, its newest depth otherwise."""
        frame, slot = encode_table(table), table.stamp.slot
        if table.drafts:
            self._tables.setdefault(slot, []).append(frame)
        else:
            self._tables.pop(slot, None)  # to the end of the row, too
            self._tables[slot] = [frame]
        self.flush()

    @property
    def note(self) -> Callable[[Round], None] | None:
        """Where rounds are told; None: nobody asks. They go with what is sent next, the newest where there are many."""
        return self._tell_round if self.shape.rounds else None

    def _tell_round(self, one: Round) -> None:
        self._rounds.append(encode_round(one))

    def announce(self, state: DraftState, max_length: int = 0) -> None:
        """Tell the state, and the longest text that the draft can hold."""
        self._states.append(frames.pack(Kind.STATE, frames.STATE.pack(int(state), max_length)))
        self.flush()

    def flush(self) -> bool:
        """Send what can be sent without waiting; whether that was all. Raises `TargetGone`."""
        while self._unsent or self._gather():
            try:
                sent = self._connection.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise TargetGone(f"the connection broke: {error}") from error
            self._unsent = self._unsent[sent:]
        return True

    def awaited(self) -> tuple[int, int]:
        """What to poll for: a step that comes, or room for what waits to be sent."""
        return self._connection.fileno(), select.POLLIN | (0 if self.flush() else select.POLLOUT)

    def wait(self, milliseconds: int) -> None:
        """Sleep until a step comes, or until more can be sent where something waits."""
        poll = select.poll()
        poll.register(*self.awaited())
        poll.poll(milliseconds)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _gather(self) -> bool:
        """Join the next frames to be sent; whether there are any."""
        parts, self._states = self._states, []
        if self._taken != self._told:
            self._told = self._taken
            parts.append(frames.pack(Kind.TAKEN, frames.TAKEN.pack(self._taken)))
        parts += self._rounds
        self._rounds.clear()
        size = 0
        while self._tables and size < _SEND_BYTES:
            depths = self._tables.pop(next(iter(self._tables)))
            parts += depths
            size += sum(map(len, depths))
        self._unsent = memoryview(b"".join(parts))
        return bool(parts)

    def _read(self) -> None:
        """Take in some of what has come. The rest waits in the system's buffers, and then at the target side."""
        try:
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise TargetGone("the target side hung up")
            for _, payload in self._reader.feed(data):
                self._steps.append(payload)
        except BlockingIOError:
            pass
        except FrameError as error:
            raise TargetGone(f"the target side sent {error}") from error
        except OSError as error:
            raise TargetGone(f"the connection broke: {error}") from error


class NetworkEnd:
    """The draft side's end of a `NetworkChannel`."""

    def __init__(self, invitation: Invitation) -> None:
        """Raises `Refused` or `OSError` where the target side does not let us in."""
        connection = knock(invitation)
        watch_closely(connection)
        self.mailbox = FarMailbox(connection, invitation.shape)

    def idle(self, since: float, may_sleep: bool = True) -> None:
        """Wait a little for the next step: at first by yielding, later asleep until one comes."""
        if time.perf_counter() - since < YIELD_SECONDS:
            os.sched_yield()
        else:
            self.mailbox.wait(SLEEP_MILLISECONDS if may_sleep else 1)

    def check(self) -> None:
        """The stream tells when its steps are read."""

    def lie_down(self) -> tuple[int, int] | None:
        """The stream."""
        return self.mailbox.awaited()

    def get_up(self) -> None:
        """Nothing was put down."""

    def close(self) -> None:
        """Hang up."""
        self.mailbox.close()
