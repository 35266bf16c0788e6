"""What a simulation is fed with: how long passes take, what is accepted, how often an outcome was predicted.

Times are seconds, rates lie between 0 and 1. A world says nothing of what is done in it; that is a `Plan`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

_LEAST_MISS: Final = 1e-6
_EXPONENT: Final = 0.87
"""Of the paper's power law 1 - hit(N) = N^-r (Definition 11), where one rate alone is known: `drafting/pace.py`."""


class WorldError(ValueError):
    """A world cannot be like this; one line."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a forward by the tokens (or rows) in it: straight lines between the points, and on beyond them."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not self.points or sizes != sorted(set(sizes)) or sizes[0] < 0:
            raise WorldError(f"pass times need points of growing size, not {list(self.points)}: write [[1, 0.015]]")
        if any(not 0 <= seconds < math.inf for _, seconds in self.points):
            raise WorldError(f"a pass time is no number of seconds: {list(self.points)}")

    @classmethod
    def linear(cls, base: float, per_token: float = 0.0) -> PassTime:
        """base + per_token * tokens."""
        return cls(((0.0, base), (1.0, base + per_token)))

    def at(self, size: float) -> float:
        """Seconds of a forward over `size` tokens; never below 0."""
        points = self.points
        if len(points) == 1:
            return points[0][1]
        right = 1
        while right < len(points) - 1 and size > points[right][0]:
            right += 1
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))

    def line(self, low: float, high: float) -> tuple[float, float]:
        """base and slope of the line through two sizes."""
        slope = (self.at(high) - self.at(low)) / (high - low) if high > low else 0.0
        return self.at(low) - slope * low, slope

    def times(self, factor: float) -> PassTime:
        """All of it so many times as long."""
        return PassTime(tuple((size, factor * seconds) for size, seconds in self.points))


@dataclass(frozen=True)
class HitCurve:
    """The chance that the outcome is among N predicted ones: the miss rate is a power of N between the points.

    One point goes on with the exponent 0.87; points of one height are a constant.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = [branches for branches, _ in self.points]
        if not self.points or numbers != sorted(set(numbers)) or numbers[0] < 1:
            raise WorldError(f"hit rates need points of growing N, not {list(self.points)}: write [[12, 0.9]]")
        if any(not 0 <= rate <= 1 for _, rate in self.points):
            raise WorldError(f"a hit rate lies between 0 and 1: {list(self.points)}")

    @classmethod
    def constant(cls, rate: float) -> HitCurve:
        """The same at every N."""
        return cls(((1, rate), (2, rate)))

    def at(self, branches: float) -> float:
        """The hit rate with so many branches."""
        rates = {rate for _, rate in self.points}
        if rates <= {0.0, 1.0} or (len(self.points) > 1 and len(rates) == 1):
            return self.points[-1][1]
        logs = [(math.log(n), math.log(min(1.0, max(_LEAST_MISS, 1 - rate)))) for n, rate in self.points]
        if len(logs) == 1:
            slope, (x0, y0) = -_EXPONENT, logs[0]
        else:
            segments = list(pairwise(logs))
            wanted = math.log(branches)
            (x0, y0), (x1, y1) = next((segment for segment in segments if wanted <= segment[1][0]), segments[-1])
            slope = (y1 - y0) / (x1 - x0)
        return min(1.0, max(0.0, 1 - math.exp(y0 + slope * (math.log(branches) - x0))))


@dataclass(frozen=True)
class World:
    """Two models on their machines.

    `target_pass`: a verify pass by the tokens in it, host work included. `draft_pass`: a draft forward by its rows.
    `fork`: what a draft round has beside its forwards (choosing the branches). `service`: look-up and reply of an
    engine that waits for its draft. `reach[j - 1]`: chance that at least j drafts are accepted after a hit,
    `backup_reach` the same of drafts made just in time after a miss (`reach` unless given). `guessed`: share of the
    missed outcomes for which the text itself has a guess, accepted by `guess_reach`. `latency`: one way of a
    message. `jitter`: standard deviation of the duration of a pass, and of a draft round, relative to it.
    `serial_factor`: a verify pass where the draft shares the target's device, over one where it does not (caches; above
    1 it holds for draft forwards, too); `serial_overhead`: what ordinary drafting has beside its forwards. `source`:
    where each number comes from.
    """

    name: str
    target_pass: PassTime
    draft_pass: PassTime
    reach: tuple[float, ...]
    hits: HitCurve
    fork: float = 0.0
    service: float = 0.0
    backup_reach: tuple[float, ...] = ()
    guessed: float = 0.0
    guess_reach: tuple[float, ...] = ()
    latency: float = 0.0
    jitter: float = 0.0
    serial_factor: float = 1.0
    serial_overhead: float = 0.0
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("reach", "backup_reach", "guess_reach"):
            chances = getattr(self, name)
            if any(not 0 <= chance <= 1 for chance in chances) or list(chances) != sorted(chances, reverse=True):
                raise WorldError(f"{name} must fall from 1 to 0, not {list(chances)}: it is P(at least j accepted)")
        for name in ("fork", "service", "latency", "jitter", "serial_overhead", "serial_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise WorldError(f"{name} cannot be {getattr(self, name)}: write a number of at least 0")
        if not 0 <= self.guessed <= 1:
            raise WorldError(f"guessed is a share, not {self.guessed}: write a number from 0 to 1")

    @property
    def longest(self) -> int:
        """K at most: as far as acceptance is known."""
        return len(self.reach)

    def after_miss(self) -> tuple[float, ...]:
        """Acceptance of drafts made just in time."""
        return self.backup_reach or self.reach

    def cost_ratio(self, drafts: int, batch: int = 1) -> float:
        """c: what ordinary drafting takes, in verify passes, both on one device."""
        return self.serial_drafting(drafts, batch) / (self.serial_factor * self.target_pass.at(batch * (drafts + 1)))

    def serial_drafting(self, drafts: int, batch: int = 1) -> float:
        """Seconds of ordinary drafting on the target's own device."""
        return max(1.0, self.serial_factor) * (self.serial_overhead + drafts * self.draft_pass.at(batch))

    def replace(self, **changes: Any) -> World:
        """The same but for these."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; `from_json` reads it back."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "target_pass": [list(point) for point in self.target_pass.points],
            "draft_pass": [list(point) for point in self.draft_pass.points],
            "hits": [list(point) for point in self.hits.points],
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> World:
        """A world that someone wrote. Raises WorldError with one line for what cannot be."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise WorldError(f"unknown key {unknown[0]!r} in a world: write one of {', '.join(sorted(known))}")
        needed = ("name", "target_pass", "draft_pass", "reach", "hits")
        if missing := [name for name in needed if name not in data]:
            raise WorldError(f"a world needs {', '.join(needed)}: {missing[0]} is missing")
        try:
            own = dict(data)
            for name, kind in (("target_pass", PassTime), ("draft_pass", PassTime), ("hits", HitCurve)):
                own[name] = kind(_points(data[name]))
            for name in ("reach", "backup_reach", "guess_reach"):
                if name in data:
                    own[name] = tuple(float(chance) for chance in data[name])
            return cls(**own)
        except TypeError as error:
            raise WorldError(f"a world has numbers and lists of them: {error}") from None

    @classmethod
    def read(cls, path: Path) -> World:
        """From a JSON file. Raises WorldError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WorldError(f"{path} cannot be read as JSON ({error}): write a file like --print-world does") from None
        if not isinstance(data, dict):
            raise WorldError(f"{path} holds no object: write a file like --print-world does")
        return cls.from_json(data)


def reach_of(acceptance: float, drafts: int) -> tuple[float, ...]:
    """P(at least j accepted), j = 1 .. K, where each draft is accepted with the same chance."""
    return tuple(acceptance**j for j in range(1, drafts + 1))


def _points(data: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in data)
