"""What the target side sees of a draft side, wherever that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from vllm_saguaro.messages import Proposals, Round, Stamp, Step, Table


class Channel(Protocol):
    """One draft side. No call ever waits for a forward of the draft, except `post` of the inline placement."""

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        ...

    @property
    def alive(self) -> bool:
        """Whether a draft side is there that can answer. It may be True again later: of another life (see `epoch`)."""
        ...

    @property
    def shards(self) -> Sequence[range]:
        """The slots of each draft side behind this channel. An ordinary channel has one range with all its slots."""
        ...

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step has waited unread, as far as it was watched; 0.0: nothing waits.

        A draft side takes steps in between any two forwards, so a step that waits for long means that it hangs.
        """
        ...

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling that the draft side chose last; None: it draws no drafts, has chosen none yet, or is
        not there. Of several draft sides the mean of those that have one.
        """
        ...

    def epoch(self, slot: int) -> int:
        """Which life of which draft side answers for this slot: never used again once that has ended; 0: nobody does.

        Where it is another one than before, all that the draft side knew of the requests in these slots is lost.
        """
        ...

    @property
    def resident_bytes(self) -> int:
        """Memory that the draft side has outside of this process."""
        ...

    def post(self, step: Step) -> bool:
        """Tell the draft side a step. False when it could not be taken: nothing of it will be acted on."""
        ...

    def read(self, slot: int) -> Table | None:
        """The table of a slot as far as it is, of whichever round; None while it is being replaced."""
        ...

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of the first `depth` drafts of a branch of the table (stamp, version); None: take them as certain.

        Wanted after the tokens, when the sampler has the logits; it is there until the round after the next begins.
        """
        ...

    def wait_until_ready(self) -> None:
        """Return once the draft has loaded. Raises `DraftFailed` when it cannot, or is closed meanwhile."""
        ...

    def close(self) -> None:
        """End the draft side, by force if need be, and give back all it held. It takes no longer than a moment.

        May be called twice, and while another thread is in `wait_until_ready`; not during any other call.
        """
        ...


@runtime_checkable
class Lender(Protocol):
    """Whose mailbox lies in memory of this machine, so that a device can reach it."""

    def lend(self) -> memoryview | None:
        """The mailbox of the present life; None where there is none. It stays mapped as long as anyone has it."""
        ...


@runtime_checkable
class Traced(Protocol):
    """Who can say what a draft side was busy with."""

    def rounds(self) -> Sequence[Round]:
        """The rounds of its present life since the last call; none where its mailbox has no room for them.

        For one thread alone, which may be another than that of the other calls.
        """
        ...


@runtime_checkable
class Placed(Protocol):
    """Whose draft side has to find room first, among others."""

    def wait_for_room(self, seconds: float) -> None:
        """`wait_until_ready` shall wait no longer than so for room, counted from when there was found to be none.

        It raises `NoRoom` then, goes on asking for room all the same, and may be called again. For any thread, also
        while another one is in it. Loading takes as long as ever.
        """
        ...


class LendingChannel(Channel, Lender, Protocol):
    """A draft side whose mailbox may be lent."""


class DraftFailed(RuntimeError):
    """The draft side did not come up."""


class NoRoom(DraftFailed):
    """There is no room for the draft side so far. It is still asked for."""

    def __init__(self, message: str, lacking: str) -> None:
        """`lacking`: what would have to be free on one node."""
        super().__init__(message)
        self.lacking = lacking


class NotAdmitted(DraftFailed):
    """A draft pool is there, and does not take this engine; the message says why, in one line."""

    def __init__(self, why: str, disagrees: bool = False) -> None:
        """`disagrees`: the engine's settings are others than those of the pool. Else there is no room for it now."""
        super().__init__(why)
        self.disagrees = disagrees
