"""The draft side in a process of its own, on its own cores.

The mailbox lies in a memfd that the child inherits, the wake-up is an eventfd, and the child's standard input is a
pipe that nobody writes to after the start: it ends when this process ends, in whatever way, and the child ends with
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import IO, Any

from vllm_saguaro.messages import Step
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox
from vllm_saguaro.placement.mailbox_channel import MailboxChannel
from vllm_saguaro.placement.memfd import sealed_memfd

_END_TIMEOUT_SECONDS = 5.0
"""The system takes longer than a moment to end a killed process only where a device holds it. It ends later then."""
_YIELD_SECONDS = 2e-3
_NAP_SECONDS = 50e-3
_SLEEP_MILLISECONDS = 1000
_PARENT_CHECK_MILLISECONDS = 1000


class ProcessChannel(MailboxChannel):
    """Starts the draft process at once; `wait_until_ready` returns when its model is loaded."""

    def __init__(
        self, module: str, options: Mapping[str, Any], shape: MailboxShape, environment: Mapping[str, str]
    ) -> None:
        """`python -m module` is the draft side; it gets `options` and `shape` as one line of JSON on its standard
        input.

        `environment` is the child's whole environment.
        """
        self._memory_fd = sealed_memfd("saguaro-mailbox", shape.total_bytes)
        self._memory = mmap.mmap(self._memory_fd, shape.total_bytes)
        super().__init__(Mailbox(memoryview(self._memory), shape))
        self._bell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],  # -P: not what lies in the working directory
            stdin=subprocess.PIPE,
            pass_fds=(self._memory_fd, self._bell_fd),
            env=dict(environment),
        )
        start = {
            "memory_fd": self._memory_fd,
            "bell_fd": self._bell_fd,
            **dataclasses.asdict(shape),
            "parent": os.getpid(),
            "options": dict(options),
        }
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once: `wait_until_ready` says so
            self._process.stdin.write(json.dumps(start).encode() + b"\n")
            self._process.stdin.flush()
        # Should this object be dropped without `close`, the end of the pipe still ends the child.
        self._finalizer = weakref.finalize(self, _close_quietly, self._process.stdin)
        threading.Thread(
            target=_watch, args=(self._process, weakref.ref(self)), name="saguaro-draft-watch", daemon=True
        ).start()

    @property
    def pid(self) -> int:
        """Process id of the draft side."""
        return self._process.pid

    def post(self, step: Step) -> bool:
        """Put the step into the mailbox, and ring if the draft side sleeps."""
        if not self.alive or not self._mailbox.post(step):
            return False
        if self._mailbox.asleep:
            os.eventfd_write(self._bell_fd, 1)
        return True

    def lend(self) -> memoryview | None:
        """The mailbox, for a device; None once it is closed."""
        with self._closing:
            return None if self._closed else memoryview(self._memory)

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
        self._mailbox.close()
        with contextlib.suppress(BufferError):  # lent: it goes with the last who has it
            self._memory.close()
        del self._memory
        os.close(self._memory_fd)
        os.close(self._bell_fd)


def _close_quietly(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # what was still to be flushed to a child that has ended
        pipe.close()


def _watch(process: subprocess.Popen[bytes], channel: weakref.ref[ProcessChannel]) -> None:
    process.wait()
    owner = channel()
    if owner is not None:
        owner._trouble = f"its process ended with exit status {process.returncode}"
        owner.alive = False


class DraftEnd:
    """The draft side's end of a `ProcessChannel`: made from the line of JSON on standard input."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        shape = MailboxShape(**{field.name: start[field.name] for field in dataclasses.fields(MailboxShape)})
        self._memory = mmap.mmap(start["memory_fd"], shape.total_bytes)
        self.mailbox = Mailbox(memoryview(self._memory), shape, existing=True)
        self.options: Mapping[str, Any] = start["options"]
        self._bell_fd: int = start["bell_fd"]
        self._parent: int = start["parent"]
        self._poll = select.poll()  # and not `select`: an inherited descriptor may be above 1023
        self._poll.register(self._bell_fd, select.POLLIN)

    def end_with_parent(self) -> None:
        """From now on this process ends as soon as its standard input does, whatever it is doing."""
        threading.Thread(target=self._follow, name="saguaro-parent-watch", daemon=True).start()

    def idle(self, since: float, may_sleep: bool = True) -> None:
        """Wait a little for the next step: at first by yielding, later asleep until the bell rings.

        `since`: when there was last something to do (`time.perf_counter`). `may_sleep`: the bell would ring. A round of
        the target takes a millisecond or more, so yielding for longer than a few of them would only burn a core.
        """
        waited = time.perf_counter() - since
        if waited < _YIELD_SECONDS:
            os.sched_yield()
        elif waited < _NAP_SECONDS or not may_sleep:
            time.sleep(50e-6)
        else:
            self._sleep()

    def _sleep(self) -> None:
        self.mailbox.fall_asleep(True)
        if not self.mailbox.has_step:  # posted before the other side could see that we sleep
            self._poll.poll(_SLEEP_MILLISECONDS)
        self.mailbox.fall_asleep(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell_fd)

    def _follow(self) -> None:
        stdin, poll = sys.stdin.fileno(), select.poll()
        poll.register(stdin, select.POLLIN)
        while os.getppid() == self._parent:  # a fork of the parent may still hold the pipe's other end
            if poll.poll(_PARENT_CHECK_MILLISECONDS) and not os.read(stdin, 4096):
                break
        os._exit(0)
