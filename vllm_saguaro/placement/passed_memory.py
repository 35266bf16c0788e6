"""The draft side on this machine in a process that is no child of ours: shared memory, passed through a socket.

Memory and bell are the same as in the process placement. A child would inherit them; here they are handed over
(SCM_RIGHTS) once the draft side has shown its token, so nothing has a name in /dev/shm that could be guessed or left
behind, and a small /dev/shm is no limit. Neither side can change the size of the memory under the other. After that the
socket carries nothing: when it closes, the other side has ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from vllm_saguaro.placement.draft_end import TargetGone
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.meeting import Invitation, Listener, Refused, knock, peer
from vllm_saguaro.placement.memfd import keeps_its_size
from vllm_saguaro.placement.shared_memory import SharedMemoryChannel, SharedMemoryEnd

_JOIN_SECONDS = 2.0
_HANDOVER_SECONDS = 5.0


class PassedMemoryChannel(SharedMemoryChannel):
    """The target side. It listens on this machine only; the draft side comes with the `invitation`."""

    def __init__(self, shape: MailboxShape) -> None:
        """Raises `OSError` where the system has no memory or no descriptor left, `RuntimeError` where it has no
        thread.
        """
        super().__init__(shape)
        self._connection: socket.socket | None = None
        self._pid = 0
        with contextlib.ExitStack() as undo:
            undo.callback(self._let_go)
            self._listener = Listener(shape)
            undo.callback(self._listener.close)
            self._trouble = "the draft side never connected"
            self._thread = threading.Thread(target=self._follow, name="saguaro-draft-watch", daemon=True)
            self._thread.start()
            undo.pop_all()

    @property
    def invitation(self) -> Invitation:
        """What the draft side needs to come in."""
        return self._listener.invitation

    @property
    def pid(self) -> int:
        """Process id of the draft side; 0 while it is not here, or where it cannot be seen."""
        return self._pid

    def hang_up(self, trouble: str) -> None:
        """End the draft side. What has come stays readable."""
        if self.alive:
            self._trouble = trouble
        self.alive = False
        self._listener.stop()
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, which ends the draft side, and let go of the memory."""
        with self._closing:
            if self._closed:
                return
            self._closed, self.alive = True, False
        self.hang_up("closed")
        self._thread.join(_JOIN_SECONDS)
        self._let_go()

    def _follow(self) -> None:
        """Let the draft side in, hand the memory over, and notice when it ends."""
        trouble = "it hung up"
        try:
            connection = self._listener.accept()
            if connection is None:
                return
            with connection:
                self._pid, _ = peer(connection)
                connection.settimeout(_HANDOVER_SECONDS)
                with self._closing:
                    if self._closed:
                        return
                    socket.send_fds(connection, [b"M"], [self._memory_fd, self._bell_fd])
                    self._connection = connection
                connection.settimeout(None)
                while connection.recv(64):
                    pass  # nothing is expected
        except Refused as error:
            trouble = str(error)
        except OSError as error:
            trouble = f"the connection broke: {error}"
        finally:
            if self.alive:
                self._trouble = trouble
            self.alive = False


class PassedMemoryEnd(SharedMemoryEnd):
    """The draft side's end of a `PassedMemoryChannel`."""

    def __init__(self, invitation: Invitation) -> None:
        """Raises `Refused` or `OSError` where the target side does not let us in, `LayoutError` where what it hands
        over is no mailbox of this shape, `RuntimeError` where the system has no thread left.
        """
        self._connection = knock(invitation)
        self._ended = False
        with contextlib.ExitStack() as undo:  # a pool lives on after it
            undo.callback(self._connection.close)
            _, descriptors, _, _ = socket.recv_fds(self._connection, 1, 2)
            for descriptor in descriptors:
                undo.callback(os.close, descriptor)
            if len(descriptors) != 2:
                raise Refused("the target side handed over no memory")
            memory_fd, bell_fd = descriptors
            if not keeps_its_size(memory_fd):
                raise Refused("the target side handed over memory that it could make smaller")
            super().__init__(memory_fd, bell_fd, invitation.shape)
            undo.callback(self._unmap)
            self._connection.settimeout(None)
            self._thread = threading.Thread(target=self._follow, name="saguaro-target-watch", daemon=True)
            self._thread.start()
            undo.pop_all()
        os.close(memory_fd)  # the mapping stays

    def idle(self, since: float, may_sleep: bool = True) -> None:
        """Wait a little for the next step: at first by yielding, later asleep until the bell rings."""
        self.check()
        super().idle(since, may_sleep)

    def check(self) -> None:
        """Raises `TargetGone` once the other side has hung up."""
        if self._ended:
            raise TargetGone("the target side hung up")

    def close(self) -> None:
        """Hang up, and let go of the memory."""
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_JOIN_SECONDS)
        self._connection.close()
        os.close(self._bell_fd)
        self._unmap()

    def _unmap(self) -> None:
        self.mailbox.close()
        self._memory.close()

    def _follow(self) -> None:
        with contextlib.suppress(OSError):
            while self._connection.recv(64):
                pass  # nothing is expected
        self._ended = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._bell_fd, 1)
