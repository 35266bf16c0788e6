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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vllm_saguaro.messages import Proposals, Stamp, Step, Table
from vllm_saguaro.placement.channel import DraftFailed
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import DraftState, Mailbox
from vllm_saguaro.placement.memfd import sealed_memfd

START_TIMEOUT_SECONDS = 600.0
"""Loading and compiling a large draft takes minutes on a cold cache."""
_END_TIMEOUT_SECONDS = 5.0
"""The system takes longer than a moment to end a killed process only where a device holds it. It ends later then."""
_YIELD_SECONDS = 2e-3
_NAP_SECONDS = 50e-3
_PARENT_CHECK_SECONDS = 1.0


class ProcessChannel:
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
        self._mailbox = Mailbox(memoryview(self._memory), shape)
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
        self.alive = True
        self.shards: Sequence[range] = (range(shape.slots),)
        self._closed = False
        self._closing = threading.Lock()
        self._max_length = 0
        threading.Thread(
            target=_watch, args=(self._process, weakref.ref(self)), name="saguaro-draft-watch", daemon=True
        ).start()

    @property
    def pid(self) -> int:
        """Process id of the draft side."""
        return self._process.pid

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return self._max_length

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step in the mailbox has waited."""
        return self._mailbox.stalled_seconds if self.alive else 0.0

    def epoch(self, slot: int) -> int:
        """One process, one life."""
        return int(self.alive)

    def post(self, step: Step) -> bool:
        """Put the step into the mailbox, and ring if the draft side sleeps."""
        if not self.alive or not self._mailbox.post(step):
            return False
        if self._mailbox.asleep:
            os.eventfd_write(self._bell_fd, 1)
        return True

    def read(self, slot: int) -> Table | None:
        """The table of a slot, as far as it is."""
        return self._mailbox.read(slot) if self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of a branch's drafts; it stays readable when the draft process has ended."""
        return None if self._closed else self._mailbox.proposals(stamp, version, branch, depth)

    def lend(self) -> memoryview | None:
        """The mailbox, for a device; None once it is closed."""
        with self._closing:
            return None if self._closed else memoryview(self._memory)

    def wait_until_ready(self) -> None:
        """Wait for the model to load. Raises `DraftFailed` when it does not."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while (state := self._state()) == DraftState.STARTING:
            if not self.alive:
                raise DraftFailed(f"the draft process ended while it started (exit status {self._process.returncode})")
            if time.monotonic() > deadline:
                raise DraftFailed(f"the draft process was not ready after {START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.01)
        if state == DraftState.FAILED:
            raise DraftFailed("the draft process could not load its model: its own error is in the log above")

    def _state(self) -> DraftState:
        with self._closing:  # another thread may close what is read here
            if self._closed:
                raise DraftFailed("the draft process was closed while it started")
            self._max_length = self._mailbox.max_length
            return self._mailbox.state

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

    @property
    def resident_bytes(self) -> int:
        """Memory that the draft process has now; 0 where the system does not tell."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        except OSError:
            return 0
        return int(pages) * mmap.PAGESIZE


def _close_quietly(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # what was still to be flushed to a child that has ended
        pipe.close()


def _watch(process: subprocess.Popen[bytes], channel: weakref.ref[ProcessChannel]) -> None:
    process.wait()
    owner = channel()
    if owner is not None:
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
            select.select([self._bell_fd], [], [], 1.0)
        self.mailbox.fall_asleep(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell_fd)

    def _follow(self) -> None:
        stdin = sys.stdin.fileno()
        while os.getppid() == self._parent:  # a fork of the parent may still hold the pipe's other end
            readable, _, _ = select.select([stdin], [], [], _PARENT_CHECK_SECONDS)
            if readable and not os.read(stdin, 4096):
                break
        os._exit(0)
