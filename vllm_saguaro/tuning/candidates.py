"""What is tried and what is chosen: pure functions of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vllm_saguaro.config import AUTO, VLLM_KEYS

PLAIN: Final = "plain"
DRAFT_MODEL: Final = "draft_model"
SAGUARO: Final = "saguaro"

MARGIN: Final = 0.02
"""A later candidate must be faster by this share to be chosen: earlier ones change less of what is usual."""

_OF_ANY_DRAFT: Final = frozenset(VLLM_KEYS) - {"num_speculative_tokens", "draft_sample_method"}
"""Keys of the user that say what the draft is, not how it is used: every method's draft is that one."""

Load = tuple[int, float]
"""Requests at once, and their temperature."""
Speeds = Mapping[Load, float]
"""Tokens a second by load."""


@dataclass(frozen=True)
class Candidate:
    """An engine to try: the method, and keys of its speculative config (without `method` and `model`)."""

    method: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short and unique among those of a run."""
        short = {"num_speculative_tokens": "K", "branches": "N", "sampling_c": "C"}
        return " ".join([self.method, *(f"{short.get(key, key)}={value}" for key, value in self.keys.items())])

    def changed(self, **keys: Any) -> Candidate:
        """The same with other keys."""
        return Candidate(self.method, {**self.keys, **keys})

    def speculative_config(self, draft: str, fixed: Mapping[str, Any]) -> dict[str, Any] | None:
        """What vLLM is told; `fixed`: keys that the user has written for saguaro. None for plain."""
        if self.method == PLAIN:
            return None
        own = {key: value for key, value in fixed.items() if self.method == SAGUARO or key in _OF_ANY_DRAFT}
        return {"method": self.method, "model": draft, **self.keys, **own}


def fixed_while_watched(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The user's keys without those that would keep the watched engine from showing all that is to be seen."""
    return {
        key: value
        for key, value in fixed.items()
        if key not in ("adaptive", "backup") and not (key == "branches" and value == AUTO)
    }


@dataclass(frozen=True)
class Tried:
    """A candidate that was measured: tokens a second by load, and the smallest and largest of its repetitions."""

    candidate: Candidate
    speeds: dict[Load, float]
    spread: dict[Load, tuple[float, float]] = field(default_factory=dict)


def gain(speeds: Speeds, plain: Speeds) -> float:
    """How many times as fast as plain decoding, over all loads that both have: the geometric mean.

    Raises ValueError where they have none in common, or a speed is not positive.
    """
    shared = [load for load in speeds if load in plain]
    if not shared:
        raise ValueError("the two were not measured under the same load")
    if any(speeds[load] <= 0 or plain[load] <= 0 for load in shared):
        raise ValueError("a speed must be positive")
    return math.exp(sum(math.log(speeds[load] / plain[load]) for load in shared) / len(shared))


def first_of_the_best(tried: Sequence[Tried], plain: Speeds, margin: float = MARGIN) -> Tried:
    """The fastest; an earlier one that is slower by less than `margin` goes before it.

    Raises ValueError where there is none.
    """
    if not tried:
        raise ValueError("nothing was tried")
    gains = [gain(each.speeds, plain) for each in tried]
    most = max(gains)
    return next(each for each, own in zip(tried, gains, strict=True) if own * (1 + margin) >= most)


def shortlist(predicted: Mapping[tuple[int, int], Speeds], plain: Speeds, most: int) -> list[tuple[int, int]]:
    """The (K, N) that are worth a real run, best first: of each K the best N; `most` at most.

    Of equals the smaller K and N.
    """
    by_k: dict[int, tuple[float, int]] = {}
    for (k, n), speeds in sorted(predicted.items()):
        own = gain(speeds, plain)
        if k not in by_k or own > by_k[k][0] * (1 + 1e-9):
            by_k[k] = own, n
    ordered = sorted(by_k.items(), key=lambda item: (-item[1][0], item[0]))
    return [(k, n) for k, (_, n) in ordered[:most]]


def recommended(chosen: Tried, others: Sequence[Tried], plain: Speeds) -> str:
    """The method to use: saguaro, unless one of the others is faster over all loads."""
    best = max(others, key=lambda each: gain(each.speeds, plain))
    ahead = gain(best.speeds, plain) > gain(chosen.speeds, plain)
    return best.candidate.method if ahead else chosen.candidate.method


def choice_of(candidate: Candidate, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for a config: those of the candidate that the user has not fixed; `auto` is left to the engine."""
    return {key: value for key, value in candidate.keys.items() if key not in fixed and value != AUTO}
