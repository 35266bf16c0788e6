"""The draft side in a process of its own, on its own cores.

The child inherits memory and bell, and its standard input is a pipe that nobody writes to after the start: it ends
when this process ends, in whatever way, and the child ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import IO, Any

from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.shared_memory import SharedMemoryChannel, SharedMemoryEnd

_END_TIMEOUT_SECONDS = 5.0
"""The system takes longer than a moment to end a killed process only where a device holds it. It ends later then."""
_PARENT_CHECK_MILLISECONDS = 1000


class ProcessChannel(SharedMemoryChannel):
    """Starts the draft process at once; `wait_until_ready` returns when its model is loaded."""

    def __init__(
        self, module: str, options: Mapping[str, Any], shape: MailboxShape, environment: Mapping[str, str]
    ) -> None:
        """`python -m module` is the draft side; it gets `options` and `shape` as one line of JSON on its standard
        input.

        `environment` is the child's whole environment. Raises `OSError` where the system has no memory, no descriptor
        or no process left, `RuntimeError` where it has no thread.
        """
        super().__init__(shape)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],  # -P: not what lies in the working directory
                stdin=subprocess.PIPE,
                pass_fds=(self._memory_fd, self._bell_fd),
                env=dict(environment),
            )
        except BaseException:  # one that cannot be started is tried again: each time would leave two descriptors
            self._let_go()
            raise
        start = {
            "memory_fd": self._memory_fd,
            "bell_fd": self._bell_fd,
            **dataclasses.asdict(shape),
            "parent": os.getpid(),
            "options": dict(options),
        }
        assert self._process.stdin is not None
        # Should this object be dropped without `close`, the end of the pipe still ends the child.
        self._finalizer = weakref.finalize(self, _close_quietly, self._process.stdin)
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once: `wait_until_ready` says so
                self._process.stdin.write(json.dumps(start).encode() + b"\n")
                self._process.stdin.flush()
            threading.Thread(
                target=_watch, args=(self._process, weakref.ref(self)), name="saguaro-draft-watch", daemon=True
            ).start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the draft side."""
        return self._process.pid

    def close(self) -> None:
        """End the process by force, which needs no consent of one that hangs or is stopped.

        It has nothing to put in order first: it writes no file, and its memory has no name.
        """
        with self._closing:
            if self._closed:
                return
            self._closed, self.alive = True, False
        self._process.kill()
        self._finalizer()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_SECONDS)
        self._let_go()


def _close_quietly(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # what was still to be flushed to a child that has ended
        pipe.close()


def _watch(process: subprocess.Popen[bytes], channel: weakref.ref[ProcessChannel]) -> None:
    process.wait()
    owner = channel()
    if owner is not None:
        owner._trouble = f"its process ended with exit status {process.returncode}"
        owner.alive = False


class ProcessEnd(SharedMemoryEnd):
    """The draft side's end of a `ProcessChannel`: made from the line of JSON on standard input."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        shape = MailboxShape(**{field.name: start[field.name] for field in dataclasses.fields(MailboxShape)})
        super().__init__(start["memory_fd"], start["bell_fd"], shape)
        self.options: Mapping[str, Any] = start["options"]
        self._parent: int = start["parent"]

    def end_with_parent(self) -> None:
        """From now on this process ends as soon as its standard input does, whatever it is doing."""
        threading.Thread(target=self._follow, name="saguaro-parent-watch", daemon=True).start()

    def _follow(self) -> None:
        stdin, poll = sys.stdin.fileno(), select.poll()
        poll.register(stdin, select.POLLIN)
        while os.getppid() == self._parent:  # a fork of the parent may still hold the pipe's other end
            if poll.poll(_PARENT_CHECK_MILLISECONDS) and not os.read(stdin, 4096):
                break
        os._exit(0)
