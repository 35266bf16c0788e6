"""The synchronous twin: the draft side in the target's own thread, for debugging and ablation.

Same engine, same loop, same mailbox cells as the process placement; only that `post` runs the whole round before it
returns, so every table is complete and the target waits for all of it.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Sequence

from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Proposals, Round, Stamp, Step, Table
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape

logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm": only there has vLLM's logging a handler


class InlineChannel:
    """A draft side that works when it is told something, and is done when the call returns.

    An error of the draft ends the drafting, never a request: it is logged once.
    """

    def __init__(
        self,
        make_engine: Callable[[], DraftEngine],
        shape: MailboxShape,
        drafted: Callable[[float, float], None] | None = None,
        gave_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`drafted` is told from when to when the target's thread drafted (`time.perf_counter`).

        `gave_up` is called once, when an error has ended the drafting.
        """
        # Anonymous pages are there once they are used: the room for q costs nothing where there is none.
        self._mailbox = Mailbox(memoryview(mmap.mmap(-1, shape.total_bytes)), shape)
        self._engine = make_engine()
        self._loop = DraftLoop(self._engine, self._mailbox.publish, self._mailbox.note)
        self._drafted, self._gave_up = drafted, gave_up
        self.alive = True
        self.shards: Sequence[range] = (range(shape.slots),)

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return self._engine.model.max_length

    @property
    def resident_bytes(self) -> int:
        """Nothing outside of this process."""
        return 0

    @property
    def stalled_seconds(self) -> float:
        """Nothing ever waits here."""
        return 0.0

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling as of the newest table."""
        return self._mailbox.sampling_c if self.alive else None

    def epoch(self, slot: int) -> int:
        """One life."""
        return int(self.alive)

    def post(self, step: Step) -> bool:
        """Run everything that the step gives rise to."""
        if not self.alive:
            return False
        try:
            return self._run(step)
        except Exception:
            self.alive = False
            logger.exception("Saguaro: the draft failed; decoding goes on without drafts as long as this engine runs.")
            self._gave_up()
            return False

    def _run(self, step: Step) -> bool:
        if not self._mailbox.post(step):
            return False
        received = self._mailbox.receive()
        if received is None:
            return False
        began = time.perf_counter()
        self._loop.submit(received)
        while self._loop.advance():
            pass
        if self._drafted is not None:
            self._drafted(began, time.perf_counter())
        return True

    def read(self, slot: int) -> Table | None:
        """The table of a slot."""
        return self._mailbox.read(slot) if self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of a branch's drafts."""
        return self._mailbox.proposals(stamp, version, branch, depth) if self.alive else None

    def rounds(self) -> Sequence[Round]:
        """What was drafted since the last call."""
        return self._mailbox.rounds()

    def wait_until_ready(self) -> None:
        """Nothing to wait for: the engine was made in the constructor."""

    def close(self) -> None:
        """The engine goes with this object."""
        self.alive = False
