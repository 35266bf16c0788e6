"""The contract between target side and draft side: every message that crosses, and nothing else.

Both sides count the same way. A request that is admitted gets a `slot` (its row in the table area) and a `generation`
(how often that slot has been given out). Its `round` is the number of outcomes it has had. The draft side publishes, for
the round that is being verified, a `Table` of predicted outcomes; the target side looks the real outcome up in it, hands
the drafts found there to vLLM, and posts the `Outcome`. A table whose (slot, generation, round) is not the awaited one
does not exist for the reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a table or an outcome is about: a request's slot, which use of that slot, and the round within it."""

    slot: int
    generation: int
    round: int


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

    `accepted` is k: how many of the previous `speculation` were accepted. `bonus` is t*. `length` is the number of tokens of
    the request with the bonus token (both sides check it: a mismatch means that they no longer talk of the same text).
    `speculation` holds the drafts handed to vLLM for the next verification: those of the branch (k, t*) on a hit, perhaps
    fewer than K when the table was late; none on a miss.
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

    `accepted[i]`, `bonus[i]` name branch i; `drafts[i]` are its tokens so far. Branches grow together, so every
    `drafts[i]` has the same length, the depth: it reaches K when the round is finished and is a valid, shorter
    speculation before.
    """

    stamp: Stamp
    accepted: list[int]
    bonus: list[int]
    drafts: list[list[int]]

    @property
    def depth(self) -> int:
        return len(self.drafts[0]) if self.drafts else 0

    def find(self, accepted: int, bonus: int) -> int | None:
        """The branch that predicted the outcome (accepted, bonus), or None: a miss."""
        for branch, outcome in enumerate(zip(self.accepted, self.bonus, strict=True)):
            if outcome == (accepted, bonus):
                return branch
        return None
