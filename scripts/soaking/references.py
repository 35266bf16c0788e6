"""Whether an answer is plain vLLM's; and if not, whether plain vLLM itself is of two minds there.

Greedy text depends on the batch's shape where two tokens are as likely as float32 can tell, in plain vLLM as well. So
an answer that differs is asked for again, alone and among others. It is a tie if plain vLLM says it too under some
batch, or if at the first token that differs its own log-probabilities of the two are closer than `TIE`. Ties are
reported apart; everything else that differs is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scripts.soaking.answers import Answer, Choice, Fate
from scripts.soaking.traffic import Asked

TIE = 1e-4
"""Nats. Log-probabilities of this pair in float32 move by about 1e-6 to 1e-5 with the batch's shape."""
COMPANIONS = (0, 0, 1, 3, 7, 15)
"""Requests beside it when an answer is asked for again."""
MOST_ASKED_AGAIN = 100
"""Beyond so many different answers there is nothing to find out by asking: they are all wrong."""
TOP_LOGPROBS = 5
PENALTIES = {"repetition_penalty", "presence_penalty"}


def difference(ours: Answer, theirs: Answer) -> str:
    """In what our answer is not plain vLLM's; empty if it is, as far as it came."""
    if ours.fate == Fate.REFUSED or theirs.fate == Fate.REFUSED:
        if (ours.fate, ours.reason) == (theirs.fate, theirs.reason):
            return ""
        return f"{ours.fate} ({ours.reason}), plain vLLM: {theirs.fate} ({theirs.reason})"
    if theirs.fate != Fate.FINISHED:
        return f"plain vLLM has no answer: {theirs.fate} ({theirs.reason})"
    if ours.fate == Fate.FINISHED and len(ours.choices) != len(theirs.choices):
        return f"{len(ours.choices)} texts for {len(theirs.choices)}"
    for number, (a, b) in enumerate(zip(ours.choices, theirs.choices, strict=False)):
        at = first_difference(a, b)
        if at is not None:
            return f"text {number} differs from token {at} on: {a.tokens[at : at + 3]} for {b.tokens[at : at + 3]}"
        if ours.fate == Fate.FINISHED and (a.text, a.finish, a.stop, a.tokens) != (b.text, b.finish, b.stop, b.tokens):
            ends = f"{len(a.tokens)} tokens and {a.finish} for {len(b.tokens)} and {b.finish}"
            return f"text {number} is the same as far as both go, but has {ends}"
    return ""


def first_difference(a: Choice, b: Choice) -> int | None:
    """The first place at which both have a token, and not the same."""
    return next((at for at, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)


@dataclass(frozen=True)
class Again:
    """What asking plain vLLM again for one answer showed. `gap`: nats between the two tokens, None if not known."""

    index: int
    tie: bool
    why: str
    gap: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"index": self.index, "tie": self.tie, "why": self.why, "gap": self.gap}


def judge(asked: Asked, ours: Answer, theirs: Answer, again: list[Answer], gap: float | None) -> Again:
    """`again`: plain vLLM's answers under other batches. `gap`: as `gap_between` found it."""
    agreeing = sum(not difference(ours, each) for each in again)
    if agreeing:
        why = f"plain vLLM says the same in {agreeing} of {len(again)} other batches"
        return Again(asked.index, True, why, gap)
    if gap is not None and gap <= TIE:
        return Again(asked.index, True, f"plain vLLM has the two tokens {gap:.1e} nats apart", gap)
    return Again(asked.index, False, difference(ours, theirs), gap)


def gap_between(asked: Asked, ours: Answer, theirs: Answer, logprobs: list[list[dict[str, float]]]) -> float | None:
    """Nats between plain vLLM's token and ours at the first place where they differ, for a greedy request.

    `logprobs`: of each text and token plain vLLM's likeliest tokens, as vLLM names them by id. At temperature > 0 noise
    is added before the choice, and penalties are not in these log-probabilities: there the gap says nothing (None).
    """
    if asked.refused or asked.body["temperature"] != 0 or PENALTIES & asked.body.keys():
        return None
    for number, (a, b) in enumerate(zip(ours.choices, theirs.choices, strict=False)):
        at = first_difference(a, b)
        if at is not None and number < len(logprobs) and at < len(logprobs[number]):
            found = logprobs[number][at]
            mine, its = found.get(f"token_id:{a.tokens[at]}"), found.get(f"token_id:{b.tokens[at]}")
            return None if mine is None or its is None else math.fabs(its - mine)
    return None
