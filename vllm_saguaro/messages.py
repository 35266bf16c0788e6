"""The contract between target side and draft side: every message that crosses, and nothing else.

Both sides count the same way. A request that is admitted gets a `slot` (its row in the table area) and a `generation`
(how often that slot has been given out). Its `round` is the number of outcomes it has had. The draft side publishes,
for the round that is being verified, a `Table` of predicted outcomes; the target side looks the real outcome up in
it, hands the drafts found there to vLLM, and posts the `Outcome`. A table whose (slot, generation, round) is not the
awaited one does not exist for the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

GONE = -1
"""The round of a table that says: the draft side no longer has this request."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a table or an outcome is about: a request's slot, which use of that slot, and the round within it."""

    slot: int
    generation: int
    round: int

    def next(self) -> Stamp:
        """The stamp after one more outcome."""
        return Stamp(self.slot, self.generation, self.round + 1)

    def gone(self) -> Stamp:
        """The stamp of the table that says that the draft side no longer has this request."""
        return Stamp(self.slot, self.generation, GONE)


@dataclass(frozen=True, slots=True)
class Admit:
    """A request enters (or re-enters after the draft lost it): its tokens so far, and how it samples.

    `temperature` is the request's; 0 is greedy. It only shapes the prediction of outcomes, never the output.
    """

    stamp: Stamp
    temperature: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verification found in round `stamp.round`, and what is under verification next.

    `accepted` is k: how many of the previous `speculation` were accepted. `bonus` is t*. `length` is the number of
    tokens of the request with the bonus token (both sides check it: a mismatch means that they no longer talk of the
    same text). `speculation` holds the drafts handed to vLLM for the next verification: those of the branch (k, t*)
    on a hit, perhaps fewer than K when the table was late; none on a miss.
    """

    stamp: Stamp
    accepted: int
    bonus: int
    length: int
    speculation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """A request has left (finished, aborted, or beyond what the draft can hold)."""

    stamp: Stamp


@dataclass(slots=True)
class Step:
    """All that one step of the target has to tell the draft side, in the order admit, outcome, release."""

    admits: list[Admit] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.admits or self.outcomes or self.releases)


@dataclass(slots=True)
class Table:
    """The speculation cache of one request and round: predicted outcome (k, t*) -> the next drafts.

    `accepted[i]`, `bonus[i]` name branch i. `drafts[d][i]` is its d-th token: branches grow together, so the depth
    `len(drafts)` is the same for all; it reaches K when the round is finished and is a valid, shorter speculation
    before. `seconds` is the time from the outcome that began the round to the newest depth.
    """

    stamp: Stamp
    accepted: Sequence[int]
    bonus: Sequence[int]
    drafts: Sequence[Sequence[int] | np.ndarray]
    seconds: float = 0.0

    def find(self, accepted: int, bonus: int) -> int | None:
        """The branch that predicted the outcome (accepted, bonus), or None: a miss."""
        for branch, (k, token) in enumerate(zip(self.accepted, self.bonus, strict=True)):
            if token == bonus and k == accepted:
                return branch
        return None

    def speculation(self, branch: int) -> tuple[int, ...]:
        """The drafts of a branch, as deep as they are."""
        return tuple(int(row[branch]) for row in self.drafts)


class Miss(StrEnum):
    """Why an outcome got no drafts."""

    NOT_PREDICTED = "not_predicted"
    """The table was there, the outcome was not in it."""
    LATE = "late"
    """The table of this round was not there yet."""
    ABSENT = "absent"
    """The draft side does not have this request: not admitted, too long for the draft, or the draft is gone."""
