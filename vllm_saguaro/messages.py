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
from enum import IntEnum, StrEnum

import numpy as np

GONE = -1
"""The round of a table that says: the draft side no longer has this request."""

GREEDY_BELOW = 1e-5
"""Below this temperature a request is greedy (vLLM draws the line at the same place)."""


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


class Noise(StrEnum):
    """Where the noise of a request's tokens comes from, if it is known beforehand (see `algorithm/noise.py`)."""

    UNKNOWN = "unknown"
    SEED = "seed"
    """The generator that vLLM makes from the request's own seed."""
    KEY = "key"
    """A key that the target side gave the request, which had no seed."""
    POSITION = "position"
    """The seed that every request has in vLLM's runner V2, and the position (`algorithm/position_noise.py`)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request samples, as far as it helps the draft side. It shapes drafts and predictions, never the output.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` is the seed or the key that the noise comes from; where it is not
    `POSITION` itself that counts, noise number i belongs to the text position `prompt_length + i`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    noise: Noise = Noise.UNKNOWN
    seed: int = 0
    prompt_length: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def coupled(self) -> bool:
        """Whether target and draft sample with the same known noise."""
        return self.noise is not Noise.UNKNOWN and not self.greedy

    @property
    def positional(self) -> bool:
        """Whether that noise is the one of positions; all requests of one runner are alike in this."""
        return self.coupled and self.noise is Noise.POSITION

    @property
    def cut(self) -> bool:
        """Whether some tokens are out whatever the noise."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Admit:
    """A request enters (or re-enters after the draft lost it): its tokens so far, and how it samples."""

    stamp: Stamp
    sampling: Sampling
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verification found in round `stamp.round`, and what is under verification next.

    `accepted` is k: how many of the previous `speculation` were accepted; `verified` of them were in the pass at all
    (the scheduler may take fewer). `bonus` is t*. `length` is the number of tokens of the request with the bonus token
    (both sides check it: a mismatch means that they no longer talk of the same text). `speculation` holds the drafts
    handed to vLLM for the next verification: those of the branch (k, t*) on a hit, perhaps fewer than K when the table
    was late; those of the backup on a miss, or none.
    """

    stamp: Stamp
    accepted: int
    bonus: int
    length: int
    speculation: tuple[int, ...]
    verified: int


@dataclass(frozen=True, slots=True)
class Want:
    """The outcome (k, t*) of round `stamp.round` is known and has too few drafts: go on with it alone, `depth` deep.

    The draft side answers with a table of the same stamp that has this outcome as its only branch. The `Outcome` itself
    follows, with the drafts that were taken.
    """

    stamp: Stamp
    accepted: int
    bonus: int
    depth: int


@dataclass(frozen=True, slots=True)
class Release:
    """A request has left (finished, aborted, or beyond what the draft can hold)."""

    stamp: Stamp


@dataclass(slots=True)
class Step:
    """All that one step of the target has to tell the draft side, in the order admit, want, outcome, release."""

    admits: list[Admit] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.admits or self.wants or self.outcomes or self.releases)

    def part(self, slots: range) -> Step:
        """What of it is about these slots."""
        return Step(
            [admit for admit in self.admits if admit.stamp.slot in slots],
            [want for want in self.wants if want.stamp.slot in slots],
            [outcome for outcome in self.outcomes if outcome.stamp.slot in slots],
            [release for release in self.releases if release.stamp.slot in slots],
        )


@dataclass(frozen=True, slots=True)
class Proposals:
    """q: what some tokens were drawn from, over the M candidates of each. Rows sum to 1.

    tokens [..., M] int32; probabilities [..., M] float32, the very numbers that were drawn from.
    """

    tokens: np.ndarray
    probabilities: np.ndarray


@dataclass(slots=True)
class Table:
    """The speculation cache of one request and round: predicted outcome (k, t*) -> the next drafts.

    `accepted[i]`, `bonus[i]` name branch i. `drafts[d][i]` is its d-th token: branches grow together, so the depth
    `len(drafts)` is the same for all; it reaches K when the round is finished and is a valid, shorter speculation
    before. `seconds` is the time from the outcome that began the round to the newest depth. `newest` is the q of the
    newest depth [N, M], None where the drafts are certain; it is written by the draft side only, and read by
    `Channel.proposals`. `version` tells tables of one stamp apart: a round may be begun anew, with other branches.
    `sampling_c`, written by the draft side only and read by `Channel.sampling_c`, is the C of Saguaro sampling that was
    chosen as of this table; None: none yet.
    """

    stamp: Stamp
    accepted: Sequence[int]
    bonus: Sequence[int]
    drafts: Sequence[Sequence[int] | np.ndarray]
    seconds: float = 0.0
    newest: Proposals | None = None
    version: int = 0
    sampling_c: float | None = None

    def find(self, accepted: int, bonus: int) -> int | None:
        """The branch that predicted the outcome (accepted, bonus), or None: a miss."""
        for branch, (k, token) in enumerate(zip(self.accepted, self.bonus, strict=True)):
            if token == bonus and k == accepted:
                return branch
        return None

    def speculation(self, branch: int) -> tuple[int, ...]:
        """The drafts of a branch, as deep as they are."""
        return tuple(int(row[branch]) for row in self.drafts)


class Work(IntEnum):
    """What the draft side was busy with."""

    ROUND = 1
    """Tables for outcomes that are yet to come: glue, fork, decode."""
    PURSUIT = 2
    """Drafts for outcomes that are known already, made just in time: there is no glue."""
    PROMPT = 3
    """A piece of a text: glue alone."""


@dataclass(frozen=True, slots=True)
class Round:
    """One piece of work of the draft side, told for a trace and for nothing else.

    Times in nanoseconds of its machine's CLOCK_MONOTONIC: it fed the tokens that were lacking from `began` to `glued`,
    chose outcomes until `forked`, and decoded until `ended`. `rows` requests together, `branches` of each at most; of
    a `PROMPT` the tokens read, and 0.
    """

    work: Work
    began: int
    glued: int
    forked: int
    ended: int
    rows: int
    branches: int


class Miss(StrEnum):
    """Why an outcome got no drafts."""

    NOT_PREDICTED = "not_predicted"
    """The table was there, the outcome was not in it."""
    LATE = "late"
    """The table of this round was not there yet."""
    ABSENT = "absent"
    """The draft side does not have this request: not admitted, too long for the draft, or the draft is gone."""
