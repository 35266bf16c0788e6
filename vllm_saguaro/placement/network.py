"""The draft side on another node: one TCP stream, mirrored into plain memory by two threads.

The target's own thread never touches the socket. `post` puts a frame into a queue that a sender thread empties, bounded
by the size of the ring that a mailbox would have: bytes count until the draft side says that it has taken the step. A
receiver thread checks what comes back and writes it into a `Mailbox` over memory of this process, from which `read` and
`proposals` are served as in the process placement.

The stream has one life: whatever goes wrong with it (the peer closes, is silent too long, sends what cannot be true),
the channel ends, and nothing else does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import queue
import socket
import struct
import threading
import time
from collections import deque

from vllm_saguaro.messages import Step
from vllm_saguaro.placement import frames
from vllm_saguaro.placement.frames import FrameError, FrameReader, Kind, TableFrames
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import DraftState, Mailbox
from vllm_saguaro.placement.mailbox_channel import MailboxChannel
from vllm_saguaro.placement.meeting import Invitation, Listener, Refused
from vllm_saguaro.placement.wire import UNENCODABLE, encode

_LOST_MILLISECONDS = 6000
"""How long the other end may leave sent bytes unanswered."""
_READ_BYTES = 1 << 18
_JOIN_SECONDS = 2.0


def watch_closely(connection: socket.socket) -> None:
    """Send at once, and notice within seconds when the other node is gone, whether or not anything is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 2),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, _LOST_MILLISECONDS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class NetworkChannel(MailboxChannel):
    """The target side of the link. It listens; the draft side comes with the `invitation`."""

    def __init__(self, address: str, shape: MailboxShape) -> None:
        """`address`: the IP address of this node to listen on.

        Raises `ValueError` for an address that is none of one node, `OSError` where the system refuses it,
        `RuntimeError` where it has no thread left.
        """
        self._listener = Listener(shape, address)
        self._shape = shape
        memory = dataclasses.replace(shape, ring_bytes=8)  # steps do not go through it
        # Anonymous pages are there once they are used: the room for q costs nothing where there is none.
        super().__init__(Mailbox(memoryview(mmap.mmap(-1, memory.total_bytes)), memory))
        self._tables = TableFrames(shape)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Each of these is written by one thread only: what was posted by the target's, what was taken by the receiver.
        self._posted_bytes = self._taken_bytes = 0
        self._posted_steps = self._taken_steps = 0
        self._untaken: deque[tuple[int, float]] = deque()
        """Size of each step that the draft side has not taken yet, and when it was posted."""
        self._connection: socket.socket | None = None
        self._trouble = "the draft side never connected"
        self._threads = [
            threading.Thread(target=self._receive, name="saguaro-link-receiver", daemon=True),
            threading.Thread(target=self._send, name="saguaro-link-sender", daemon=True),
        ]
        try:
            self._threads[0].start()
        except BaseException:
            self._listener.close()
            raise

    @property
    def invitation(self) -> Invitation:
        """What the draft side needs to come in."""
        return self._listener.invitation

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step that the draft side has not taken has waited."""
        try:
            return time.monotonic() - self._untaken[0][1] if self.alive else 0.0
        except IndexError:  # taken meanwhile
            return 0.0

    def post(self, step: Step) -> bool:
        """Hand the step to the sender thread; False when the draft side is too far behind.

        The same for numbers that no frame can hold.
        """
        if not self.alive or self._connection is None:
            return False
        try:
            data = encode(step)
        except UNENCODABLE:
            return False
        if self._posted_bytes - self._taken_bytes + len(data) > self._shape.ring_bytes:
            return False
        self._untaken.append((len(data), time.monotonic()))
        self._posted_bytes += len(data)
        self._posted_steps += 1
        self._outgoing.put(frames.pack(Kind.STEP, data))
        return True

    def hang_up(self, trouble: str) -> None:
        """End the stream, and with it the draft side and both threads. What has come stays readable."""
        if self.alive:
            self._trouble = trouble
        self.alive = False
        self._listener.stop()
        self._outgoing.put(None)
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, which ends the draft side."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self.hang_up("closed")
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_JOIN_SECONDS)

    # ---- the two threads ---------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Let the draft side in, then write what it says into the mailbox, until the stream ends."""
        trouble = "the draft side hung up"
        try:
            connection = self._listener.accept()
            if connection is None:
                return
            watch_closely(connection)
            connection.settimeout(None)
            self._connection = connection
            if not self.alive:  # closed meanwhile, maybe before there was a connection to shut
                connection.close()
                return
            self._threads[1].start()
            reader = FrameReader(frames.bounds_of_tables(self._shape))
            while data := connection.recv(_READ_BYTES):
                for kind, payload in reader.feed(data):
                    self._take(kind, payload)
        except FrameError as error:
            trouble = f"the draft side sent {error}"
        except Refused as error:
            trouble = str(error)
        except OSError as error:
            trouble = f"the connection broke: {error}"
        except RuntimeError as error:
            trouble = f"nobody can send over it: {error}"
        finally:
            self.hang_up(trouble)
            if self._connection is not None:
                self._connection.close()

    def _take(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.TABLE:
            self._mailbox.publish(self._tables.decode(payload))
        elif kind is Kind.ROUND and self._mailbox.note is not None:
            self._mailbox.note(frames.decode_round(payload, self._shape, time.monotonic_ns()))
        elif kind is Kind.TAKEN:
            self._count_taken(*_fields(frames.TAKEN, payload))
        else:
            state, max_length = _fields(frames.STATE, payload)
            if state not in (DraftState.READY, DraftState.FAILED) or max_length < 0:
                raise FrameError(f"a state {state} that there is not")
            self._mailbox.announce(DraftState(state), max_length)

    def _count_taken(self, steps: int) -> None:
        if not self._taken_steps <= steps <= self._posted_steps:
            raise FrameError(f"that it has taken {steps} of {self._posted_steps} steps")
        while self._taken_steps < steps:
            size, _ = self._untaken.popleft()
            self._taken_bytes += size
            self._taken_steps += 1

    def _send(self) -> None:
        assert self._connection is not None
        try:
            while (frame := self._outgoing.get()) is not None:
                self._connection.sendall(frame)
        except OSError as error:
            self.hang_up(f"the connection broke: {error}")


def _fields(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    try:
        return layout.unpack(payload)
    except struct.error as error:
        raise FrameError(str(error)) from None
