"""What the draft side's loop sees of its placement, whichever it is."""

from __future__ import annotations

from typing import Protocol

from vllm_saguaro.messages import Step, Table
from vllm_saguaro.placement.mailbox import DraftState


class DraftMailbox(Protocol):
    """The draft side's half of a mailbox."""

    @property
    def dropped(self) -> int:
        """How many steps did not decode, and were dropped."""
        ...

    def receive(self) -> Step | None:
        """The oldest step not yet seen, or None."""
        ...

    def publish(self, table: Table) -> None:
        """Let the target side have a table: its keys when it is new, its newest depth otherwise."""
        ...

    def announce(self, state: DraftState, max_length: int = 0) -> None:
        """Tell the state, and the longest text that the draft can hold."""
        ...


class DraftEnd(Protocol):
    """The draft side's end of a channel. Any call may raise `TargetGone`."""

    @property
    def mailbox(self) -> DraftMailbox:
        """Steps come out of it, tables go into it."""
        ...

    def idle(self, since: float) -> None:
        """Wait a little for the next step. `since`: when there was last something to do (`time.perf_counter`)."""
        ...


class TargetGone(Exception):
    """The target side has ended, or can no longer be reached: there is nobody to draft for."""
