"""What passes through one step of the target side: a verified row, the request behind it, and what it gets next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saguaro.messages import Sampling, Stamp
from vllm_saguaro.policy import Source


@dataclass(frozen=True, slots=True)
class Verified:
    """One row of a step of the target.

    `sampled`: the accepted drafts and then the bonus token; empty when the row was a piece of a prompt. `verified`: how
    many drafts were in the pass. `length`: tokens of the request with what was sampled. `tokens` and `sampling` are
    asked for only when the draft side has to learn the request anew, `guess(n)`, at most n tokens that the request's
    own text suggests, only after a miss. `greedy`: whether the target takes its likeliest tokens.
    """

    request_id: str
    sampled: Sequence[int]
    verified: int
    length: int
    tokens: Callable[[], Sequence[int]]
    sampling: Callable[[], Sampling]
    guess: Callable[[int], Sequence[int]] = lambda _: ()
    greedy: bool = True


@dataclass(slots=True)
class Drawn:
    """Where the drafts that a request has under verification came from."""

    source: Source
    stamp: Stamp
    version: int
    branch: int


@dataclass(slots=True)
class Request:
    """What the target side knows of a request that the draft side has."""

    stamp: Stamp
    length: int
    drawn: Drawn | None = None


@dataclass(slots=True)
class Turn:
    """One row of a step while it is dealt with: its outcome (k, t*), and the drafts it gets."""

    row: Verified
    accepted: int
    bonus: int
    request: Request | None = None
    speculation: tuple[int, ...] = ()
    drawn: Drawn | None = None
    wanted: bool = False
    """Whether the draft side has this request, its table, and could go on from this outcome at once."""
    given_up: bool = False
    """Whether the draft side said that it no longer has this request."""
