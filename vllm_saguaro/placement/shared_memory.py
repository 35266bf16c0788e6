"""A mailbox in memory that a draft side on this machine has, too, and the bell that wakes a sleeping draft side.

The memory is a memfd, the bell an eventfd, so neither has a name that could be guessed or left behind. How the draft
side comes to have them is for those who derive from these two: a child inherits them (`process.py`), and one that is no
child of ours is handed them (`passed_memory.py`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time

from vllm_saguaro.messages import Step
from vllm_saguaro.placement.draft_end import NAP_SECONDS, SLEEP_MILLISECONDS, YIELD_SECONDS
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox
from vllm_saguaro.placement.mailbox_channel import MailboxChannel
from vllm_saguaro.placement.memfd import sealed_memfd


class SharedMemoryChannel(MailboxChannel):
    """The target side."""

    def __init__(self, shape: MailboxShape) -> None:
        """Raises `OSError` where the system has no memory or no descriptor left."""
        with contextlib.ExitStack() as undo:
            self._memory_fd = sealed_memfd("saguaro-mailbox", shape.total_bytes)
            undo.callback(os.close, self._memory_fd)
            self._bell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._bell_fd)
            self._memory = mmap.mmap(self._memory_fd, shape.total_bytes)
            super().__init__(Mailbox(memoryview(self._memory), shape))
            undo.pop_all()

    def post(self, step: Step) -> bool:
        """Put the step into the mailbox, and ring if the draft side sleeps."""
        if not self.alive or not self._mailbox.post(step):
            return False
        if self._mailbox.asleep:
            # The draft side has a hand on the bell as well: where it has filled it up, it will wake anyway.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._bell_fd, 1)
        return True

    def lend(self) -> memoryview | None:
        """The mailbox, for a device; None once it is closed."""
        with self._closing:
            return None if self._closed else memoryview(self._memory)

    def _let_go(self) -> None:
        """Give back memory and bell: the last thing that `close` does."""
        self._mailbox.close()
        with contextlib.suppress(BufferError):  # lent: it goes with the last who has it
            self._memory.close()
        del self._memory
        os.close(self._memory_fd)
        os.close(self._bell_fd)


class SharedMemoryEnd:
    """The draft side's end."""

    def __init__(self, memory_fd: int, bell_fd: int, shape: MailboxShape) -> None:
        """Raises `LayoutError` where the memory holds no mailbox of this shape. The descriptors stay the caller's."""
        self._memory = mmap.mmap(memory_fd, shape.total_bytes)
        self.mailbox = Mailbox(memoryview(self._memory), shape, existing=True)
        self._bell_fd = bell_fd
        self._poll = select.poll()  # and not `select`: an inherited descriptor may be above 1023
        self._poll.register(bell_fd, select.POLLIN)

    def idle(self, since: float, may_sleep: bool = True) -> None:
        """Wait a little for the next step: at first by yielding, later asleep until the bell rings.

        `since`: when there was last something to do (`time.perf_counter`). `may_sleep`: the bell would ring.
        """
        waited = time.perf_counter() - since
        if waited < YIELD_SECONDS:
            os.sched_yield()
        elif waited < NAP_SECONDS or not may_sleep:
            time.sleep(50e-6)
        else:
            if self.lie_down() is not None:
                self._poll.poll(SLEEP_MILLISECONDS)
            self.get_up()

    def lie_down(self) -> tuple[int, int] | None:
        """The bell, unless there is a step that was posted before the other side could see that we sleep."""
        self.mailbox.fall_asleep(True)
        return None if self.mailbox.has_step else (self._bell_fd, select.POLLIN)

    def get_up(self) -> None:
        """Look at the steps again, and no longer for the bell."""
        self.mailbox.fall_asleep(False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell_fd)
