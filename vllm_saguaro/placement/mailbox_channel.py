"""What every channel has in common whose tables lie in a mailbox in memory of this process, however they get there."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_saguaro.messages import Proposals, Round, Stamp, Table
from vllm_saguaro.placement.channel import DraftFailed
from vllm_saguaro.placement.mailbox import DraftState, Mailbox

START_TIMEOUT_SECONDS = 600.0
"""Loading and compiling a large draft takes minutes on a cold cache."""


class MailboxChannel:
    """Reads tables and the state of one draft side with one life. How steps get there is for those who derive from it.

    They set `alive` to False, and `_trouble` to the reason, when that life has ended; and `_closed`, under `_closing`,
    before they give back the memory.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._trouble = "it never came"
        self._max_length = 0
        self._closed = False
        self._closing = threading.Lock()
        self.alive = True
        self.shards: Sequence[range] = (range(mailbox.shape.slots),)

    @property
    def pid(self) -> int:
        """Process id of the draft side; 0 where it is not on this machine, not here yet, or cannot be seen."""
        return 0

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return self._max_length

    @property
    def resident_bytes(self) -> int:
        """Memory that the draft's process has now; 0 where the system does not tell."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1] if self.pid else "0"
        except OSError:
            return 0
        return int(pages) * mmap.PAGESIZE

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step in the mailbox has waited."""
        return self._mailbox.stalled_seconds if self.alive else 0.0

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling that the draft side told last."""
        return self._mailbox.sampling_c if self.alive else None

    def epoch(self, slot: int) -> int:
        """One draft side, one life."""
        return int(self.alive)

    def read(self, slot: int) -> Table | None:
        """The table of a slot, as far as it is."""
        return self._mailbox.read(slot) if self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of a branch's drafts; it stays readable when the draft side has ended."""
        return None if self._closed else self._mailbox.proposals(stamp, version, branch, depth)

    def rounds(self) -> Sequence[Round]:
        """What the draft side was busy with since the last call."""
        with self._closing:  # another thread may close what is read here
            return [] if self._closed else self._mailbox.rounds()

    def wait_until_ready(self) -> None:
        """Wait for the draft side to come and to load its model. Raises `DraftFailed` when it does not."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while (state := self._state()) == DraftState.STARTING:
            if not self.alive:
                raise DraftFailed(f"the draft ended while it started: {self._trouble}")
            if time.monotonic() > deadline:
                raise DraftFailed(f"the draft was not ready after {START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.01)
        if state == DraftState.FAILED:
            raise DraftFailed("the draft could not load its model: its own error is in its log")

    def _state(self) -> DraftState:
        with self._closing:  # another thread may close what is read here
            if self._closed:
                raise DraftFailed("the draft side was closed while it started")
            self._max_length = self._mailbox.max_length
            return self._mailbox.state
