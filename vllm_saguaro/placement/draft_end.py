"""What the draft side's loop sees of its placement, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vllm_saguaro.messages import Round, Step, Table
from vllm_saguaro.placement.mailbox import DraftState

YIELD_SECONDS = 2e-3
"""A draft side with nothing to do yields for so long. A round of the target takes a millisecond or more, so yielding
for longer than a few of them would only burn a core."""
NAP_SECONDS = 50e-3
"""Then it naps, where it is to be woken by a bell, until so long has passed; then it sleeps."""
SLEEP_MILLISECONDS = 1000
"""After which a sleeping draft side looks around in any case."""


class DraftMailbox(Protocol):
    """The draft side's half of a mailbox."""

    @property
    def from_device(self) -> bool:
        """Whether outcomes come from a device, which rings no bell."""
        ...

    @property
    def dropped(self) -> int:
        """How many steps did not decode, and were dropped."""
        ...

    @property
    def note(self) -> Callable[[Round], None] | None:
        """Where rounds are told, for a trace; None: nobody asks."""
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

    def idle(self, since: float, may_sleep: bool = True) -> None:
        """Wait a little for the next step. `since`: when there was last something to do (`time.perf_counter`).

        `may_sleep`: a bell would ring for it. A device that writes records rings none, nor does the end of a rest.
        """
        ...


class InvitedEnd(DraftEnd, Protocol):
    """An end that came with an invitation, and may be one of several that one draft side looks after."""

    def check(self) -> None:
        """Raises `TargetGone` where that is known; it waits for nothing."""
        ...

    def lie_down(self) -> tuple[int, int] | None:
        """Let the target side know that a step must wake us: the descriptor to poll, and for which events.

        None where there is something to do at once. `get_up` must follow in either case.
        """
        ...

    def get_up(self) -> None:
        """Look at the steps again."""
        ...

    def close(self) -> None:
        """Hang up, and give back what the link had."""
        ...


class TargetGone(Exception):
    """The target side has ended, or can no longer be reached: there is nobody to draft for."""
