"""What the target side sees of a draft side, wherever that runs."""

from __future__ import annotations

from typing import Protocol

from vllm_saguaro.messages import Proposals, Stamp, Step, Table


class Channel(Protocol):
    """One draft side. No call ever waits for a forward of the draft, except `post` of the inline placement."""

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the draft side can still answer. Once False it stays False."""
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
        """Return once the draft has loaded. Raises `DraftFailed` when it cannot."""
        ...

    def close(self) -> None:
        """End the draft side and give back all it held. May be called twice."""
        ...


class DraftFailed(RuntimeError):
    """The draft side did not come up."""
