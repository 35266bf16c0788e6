"""Times between two pieces of one stream: the usual ones, and the longest around a fault."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_BINS_A_DECADE = 20


@dataclass
class Window:
    """A stretch of time (seconds of a monotonic clock) whose longest gap is wanted; open until `end` is known.

    `longest_at`: when the longest one began and ended.
    """

    begin: float
    end: float = math.inf
    longest: float = 0.0
    longest_at: tuple[float, float] = (0.0, 0.0)

    def touches(self, since: float, now: float) -> bool:
        """Whether a gap lies in it, in part at least."""
        return now > self.begin and since < self.end


class Gaps:
    """Told of every piece of every stream. Gaps outside all windows are the usual ones, counted in logarithmic bins."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self.usual: Counter[int] = Counter()
        self.longest_usual = 0.0

    def open(self, begin: float) -> Window:
        """Begin a window; set its `end` when it is over."""
        self._windows.append(Window(begin))
        return self._windows[-1]

    def piece(self, since: float, now: float) -> None:
        """A stream that had a piece at `since` has its next one `now`."""
        gap, inside = now - since, False
        for window in self._windows:
            if window.touches(since, now):
                inside = True
                if gap > window.longest:
                    window.longest, window.longest_at = gap, (since, now)
        if not inside:
            self.usual[bin_of(gap)] += 1
            self.longest_usual = max(self.longest_usual, gap)

    def forget(self, window: Window) -> None:
        """All streams that it could have touched have ended."""
        self._windows.remove(window)


def bin_of(seconds: float) -> int:
    """The logarithmic bin of a time."""
    return math.floor(math.log10(max(seconds, 1e-6)) * _BINS_A_DECADE)


def quantile(bins: Mapping[int, int], share: float) -> float:
    """The time below which so large a share of the gaps lies, in seconds, to a bin's width; 0 without gaps."""
    left = share * sum(bins.values())
    for place in sorted(bins):
        left -= bins[place]
        if left <= 0:
            return 10 ** ((place + 0.5) / _BINS_A_DECADE)
    return 0.0


def added(tables: Iterable[Mapping[str, int]]) -> Counter[int]:
    """Bins of several slices, as JSON has them, in one table."""
    total: Counter[int] = Counter()
    for table in tables:
        for place, count in table.items():
            total[int(place)] += count
    return total
