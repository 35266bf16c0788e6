"""What is believed of two models and their machine before anything is measured while serving.

`vllm-saguaro tune` measures it, a tuned file keeps it; policy and pace begin with it and go on with what they see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Priors:
    """Times are seconds. `target_pass`: of a verify pass, and of each token in it. `draft_step`: of a decode step of
    the draft, and of each row in it. `glue`: from the outcome to the first decode step. `acceptance[j - 1]`: the chance
    of draft j once those before it are accepted. `hits`: (N, chance that the outcome is among the N likeliest), N
    growing.

    Raises ValueError with one line for what cannot be.
    """

    target_pass: tuple[float, float]
    draft_step: tuple[float, float]
    glue: float
    acceptance: tuple[float, ...]
    hits: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for name in ("target_pass", "draft_step"):
            times = getattr(self, name)
            if len(times) != 2 or not _all_numbers(times) or sum(times) <= 0:
                raise ValueError(f"{name} must be two times in seconds, not {list(times)}: write [0.01, 0.0002]")
        if not _all_numbers([self.glue]):
            raise ValueError(f"glue must be a time in seconds, not {self.glue!r}")
        if not self.acceptance or not _all_numbers(self.acceptance) or max(self.acceptance) > 1:
            raise ValueError(f"acceptance must be numbers from 0 to 1, not {list(self.acceptance)}")
        branches = [n for n, _ in self.hits]
        if not branches or not _all_numbers(branches) or branches != sorted(set(branches)) or branches[0] < 1:
            raise ValueError(f"hits must be pairs of a growing N and a share, not {list(self.hits)}: write [[12, 0.9]]")
        shares = [share for _, share in self.hits]
        if not _all_numbers(shares) or max(shares) > 1:
            raise ValueError(f"hits must have shares from 0 to 1, not {shares}")

    def chances(self, drafts: int) -> list[float]:
        """The acceptance of as many drafts; beyond what is known the last one goes on."""
        known = list(self.acceptance[:drafts])
        return known + [known[-1]] * (drafts - len(known))

    def hit_rate(self, branches: int) -> float:
        """The hit rate with so many branches: that of the largest N known up to there, or of the smallest one."""
        return next((share for n, share in reversed(self.hits) if n <= branches), self.hits[0][1])

    def target_seconds(self, tokens: float) -> float:
        """A verify pass over so many tokens."""
        base, per_token = self.target_pass
        return base + per_token * tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            **dataclasses.asdict(self),
            "target_pass": list(self.target_pass),
            "draft_step": list(self.draft_step),
            "acceptance": list(self.acceptance),
            "hits": [list(pair) for pair in self.hits],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Priors:
        """The inverse of `to_dict`. Raises ValueError with one line for what is none."""
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(data) != sorted(names):
            raise ValueError(f"it must have the keys {', '.join(names)}, not {', '.join(map(str, data)) or 'none'}")
        try:
            return cls(
                target_pass=tuple(data["target_pass"]),
                draft_step=tuple(data["draft_step"]),
                glue=data["glue"],
                acceptance=tuple(data["acceptance"]),
                hits=tuple((n, share) for n, share in data["hits"]),
            )
        except TypeError:
            raise ValueError("it must have numbers and lists of them") from None


def _all_numbers(values: Any) -> bool:
    """Whether these are finite numbers, none below 0."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf for value in values
    )
