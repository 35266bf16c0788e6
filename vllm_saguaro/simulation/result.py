"""What came of a simulated run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Result:
    """Counts of one run; times are seconds of simulated time.

    `rounds` are (request, pass) pairs, `passes` those of the target. A hit is `late` where it was served with fewer
    drafts than K; `missed_late` are outcomes that were predicted and whose table had no depth yet. `waited` is how long
    the target stood between outcomes and the next pass, `stalled` the part of it for just-in-time drafts.
    `request_seconds` is the sum over the requests of the time that each was served.
    """

    engine: str
    k: int
    branches: int
    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    passes: int = 0
    hits: int = 0
    late: int = 0
    not_predicted: int = 0
    missed_late: int = 0
    verified: int = 0
    waited: float = 0.0
    stalled: float = 0.0
    request_seconds: float = 0.0
    messages: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """That a request gets from a pass."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def step_seconds(self) -> float:
        """From outcomes to outcomes."""
        return self.seconds / self.passes if self.passes else 0.0

    @property
    def hit_rate(self) -> float:
        """Outcomes for which drafts were there, of all."""
        outcomes = self.hits + self.not_predicted + self.missed_late
        return self.hits / outcomes if outcomes else 0.0

    @property
    def late_share(self) -> float:
        """Hits with fewer than K drafts, of all hits."""
        return self.late / self.hits if self.hits else 0.0

    @property
    def seconds_per_token(self) -> float:
        """As one request sees it."""
        return self.request_seconds / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        derived = ("tokens_per_second", "tokens_per_round", "step_seconds", "hit_rate", "late_share")
        return {**asdict(self), **{name: getattr(self, name) for name in (*derived, "seconds_per_token")}}
