"""What this plugin counts beyond vLLM's own metrics, on one small shared page.

The target side adds, whoever serves metrics reads: plain 64-bit floats in memory that both map, no message and no
lock. Each word has one writer (what the threads count that look after the draft sides is added under a lock), so a
reader can at worst see a count a moment old.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from dataclasses import dataclass

from vllm_saguaro.messages import Miss

BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""Upper bounds of the time histograms, in seconds."""
_BINS = len(BUCKETS) + 1
_FIRST_BIN = 16
"""Words before it are for counters and gauges."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A count that only goes up. `label` is the value of the one label `label_name`, or empty."""

    name: str
    documentation: str
    word: int
    label: str = ""
    label_name: str = "cause"


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number that goes up and down. `sometimes`: there may be none, as at first; then it is not a number."""

    name: str
    documentation: str
    word: int
    sometimes: bool = False


@dataclass(frozen=True, slots=True)
class Histogram:
    """Times in seconds: words `word` .. `word + _BINS - 1` are the bins, the word after them is the sum."""

    name: str
    documentation: str
    word: int


HITS = Counter("saguaro_hits", "Outcomes found in the speculation cache.", 0)
LATE_TABLES = Counter(
    "saguaro_late_tables", "Hits whose speculation was shorter than K because it was not finished.", 1
)
MISSES = {
    cause: Counter(
        "saguaro_misses", "Outcomes for which the speculation cache had no drafts, by cause.", word, cause.value
    )
    for word, cause in enumerate(Miss, start=2)
}
BACKUPS = {
    kind: Counter("saguaro_backups", "Missed outcomes that got drafts from elsewhere, by kind.", word, kind, "kind")
    for word, kind in enumerate(("ngram", "jit"), start=5)
}
QUIET_STEPS = Counter("saguaro_quiet_steps", "Steps without any drafts, because drafting did not pay.", 7)
DRAFTS = Gauge("saguaro_drafts", "Drafts of a request that are worth verifying now, at most K.", 8)
BRANCHES = Gauge("saguaro_branches", "Outcomes that the newest table has drafts for.", 9)
DRAFT_RESTARTS = Counter("saguaro_draft_restarts", "Times that the draft side was started again.", 10)
DRAFT_UP = Gauge("saguaro_draft_up", "Draft sides that answer now.", 11)
DRAFT_LEFT_OFF = Gauge("saguaro_draft_left_off", "Draft sides that ended too often and are not started again.", 12)
SAMPLING_C = Gauge("saguaro_sampling_c", "C of Saguaro sampling that is chosen now, where drafts are drawn.", 13, True)
DRAFT_ROUND = Histogram(
    "saguaro_draft_round_seconds",
    "From an outcome to the finished table of the next round, on the draft side.",
    _FIRST_BIN,
)
TARGET_WAIT = Histogram(
    "saguaro_target_wait_seconds",
    "From the outcomes of a step to the drafts that are there for its hits in hand, on the target side.",
    _FIRST_BIN + _BINS + 1,
)
VERIFY = Histogram(
    "saguaro_verify_seconds",
    "From the drafts in hand to the next outcomes: telling the draft side, scheduling, verify pass, sampling.",
    _FIRST_BIN + 2 * (_BINS + 1),
)
BACKUP_WAIT = Histogram(
    "saguaro_backup_wait_seconds",
    "Waiting for just-in-time drafts, and for the rest of a late branch.",
    _FIRST_BIN + 3 * (_BINS + 1),
)
COUNTERS = (HITS, LATE_TABLES, *MISSES.values(), *BACKUPS.values(), QUIET_STEPS, DRAFT_RESTARTS)
GAUGES = (DRAFTS, BRANCHES, SAMPLING_C, DRAFT_UP, DRAFT_LEFT_OFF)
HISTOGRAMS = (DRAFT_ROUND, TARGET_WAIT, VERIFY, BACKUP_WAIT)
PAGE_BYTES = 8 * (_FIRST_BIN + len(HISTOGRAMS) * (_BINS + 1))


class CounterPage:
    """The counters over a buffer of `PAGE_BYTES` bytes."""

    def __init__(self, buffer: memoryview | None = None, new: bool = False) -> None:
        """`new`: the buffer is all zero, and nobody else has it yet."""
        self._words = (memoryview(bytearray(PAGE_BYTES)) if buffer is None else buffer).cast("d")
        self._lock = threading.Lock()
        if new or buffer is None:
            for gauge in GAUGES:
                if gauge.sometimes:
                    self.set(gauge, None)

    def add(self, counter: Counter, amount: int = 1) -> None:
        """Count `amount` more."""
        self._words[counter.word] += amount

    def observe(self, histogram: Histogram, seconds: float) -> None:
        """Count one time."""
        self._words[histogram.word + bisect_left(BUCKETS, seconds)] += 1
        self._words[histogram.word + _BINS] += seconds

    def set(self, gauge: Gauge, value: float | None) -> None:
        """Say what it is now; None: there is none."""
        self._words[gauge.word] = math.nan if value is None else value

    def count_in(self, what: Counter | Gauge, amount: int) -> None:
        """Count so many more (or fewer), where several threads count the same."""
        with self._lock:
            self._words[what.word] += amount

    def value(self, counter: Counter | Gauge) -> float:
        """The count, or what it is now."""
        return self._words[counter.word]

    def bins(self, histogram: Histogram) -> list[float]:
        """Counts by bucket, the last one for times above the last bound."""
        return list(map(float, self._words[histogram.word : histogram.word + _BINS]))

    def total(self, histogram: Histogram) -> float:
        """Sum of all times, in seconds."""
        return self._words[histogram.word + _BINS]

    def mean(self, histogram: Histogram) -> float:
        """Mean time in seconds; 0 when there is none."""
        count = sum(self.bins(histogram))
        return self.total(histogram) / count if count else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of outcomes that were hits; 0 when there was none."""
        hits = self.value(HITS)
        outcomes = hits + sum(self.value(counter) for counter in MISSES.values())
        return hits / outcomes if outcomes else 0.0
