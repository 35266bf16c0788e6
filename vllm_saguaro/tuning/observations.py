"""What one engine showed under one load, in counts and times that can be added up and sent as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MOST_TIMES: Final = 400
"""Times that are kept of one kind: enough for a median."""


@dataclass
class Observations:
    """Times are seconds.

    `passes`: of verify passes, by (requests, tokens in them). `tables`: from the outcome to a table of so many drafts,
    by (requests, depth). `ranks`: outcomes by their place among the predicted ones, from 0; `not_predicted`: those that
    were not among them. `tried[j]` and `accepted[j]`: drafts from the cache that were verified at place j once all
    before them were accepted, and those of them that were accepted.
    """

    passes: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    tables: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)
    not_predicted: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add_pass(self, rows: int, tokens: int, seconds: float) -> None:
        """A verify pass."""
        _keep(self.passes, (rows, tokens), seconds)

    def add_table(self, rows: int, depth: int, seconds: float) -> None:
        """A table as it was found."""
        _keep(self.tables, (rows, depth), seconds)

    def add_drafts(self, verified: int, accepted: int) -> None:
        """What came of the drafts of one request."""
        for place in range(min(accepted + 1, verified)):
            while len(self.tried) <= place:
                self.tried.append(0)
                self.accepted.append(0)
            self.tried[place] += 1
            self.accepted[place] += place < accepted

    @property
    def outcomes(self) -> int:
        """Outcomes whose table was there to look at."""
        return sum(self.ranks.values()) + self.not_predicted

    def hit_rate(self, branches: int) -> float:
        """The share of outcomes among the `branches` likeliest; 0 where there were none."""
        found = sum(count for rank, count in self.ranks.items() if rank < branches)
        return found / self.outcomes if self.outcomes else 0.0

    def chances(self, drafts: int, least: int = 20) -> list[float]:
        """The acceptance of each draft once those before it are accepted.

        A place with fewer than `least` observations is like the one before it; where even the first has none at all,
        nothing is accepted.
        """
        found: list[float] = []
        for place in range(drafts):
            tried = self.tried[place] if place < len(self.tried) else 0
            if tried >= least or (not found and tried):
                found.append(self.accepted[place] / tried)
            else:
                found.append(found[-1] if found else 0.0)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values only; of many times of a kind the median and their number."""
        return {
            "passes": [[*key, statistics.median(times), len(times)] for key, times in sorted(self.passes.items())],
            "tables": [[*key, statistics.median(times), len(times)] for key, times in sorted(self.tables.items())],
            "ranks": sorted(self.ranks.items()),
            "not_predicted": self.not_predicted,
            "tried": list(self.tried),
            "accepted": list(self.accepted),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Observations:
        """What `to_json` made; a median stands for as many times as it had."""
        return cls(
            passes={(rows, tokens): [seconds] * count for rows, tokens, seconds, count in data["passes"]},
            tables={(rows, depth): [seconds] * count for rows, depth, seconds, count in data["tables"]},
            ranks=Counter(dict(map(tuple, data["ranks"]))),
            not_predicted=data["not_predicted"],
            tried=list(data["tried"]),
            accepted=list(data["accepted"]),
        )

    @classmethod
    def together(cls, parts: Iterable[Observations]) -> Observations:
        """All of them as one."""
        whole = cls()
        for part in parts:
            for mine, theirs in ((whole.passes, part.passes), (whole.tables, part.tables)):
                for key, times in theirs.items():
                    mine.setdefault(key, []).extend(times)
            whole.ranks.update(part.ranks)
            whole.not_predicted += part.not_predicted
            for place, (tried, accepted) in enumerate(zip(part.tried, part.accepted, strict=True)):
                if place == len(whole.tried):
                    whole.tried.append(0)
                    whole.accepted.append(0)
                whole.tried[place] += tried
                whole.accepted[place] += accepted
        return whole


def _keep(found: dict[tuple[int, int], list[float]], key: tuple[int, int], seconds: float) -> None:
    times = found.setdefault(key, [])
    if len(times) < MOST_TIMES:
        times.append(seconds)
