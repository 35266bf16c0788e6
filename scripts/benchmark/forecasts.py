"""What the draft side believed of each outcome, against what happened and the best that N branches could have done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scripts.benchmark import counters

if TYPE_CHECKING:
    from vllm_saguaro.drafting.forecast import Forecast

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of branches for which shares are counted, as far as the engine has them."""

OUTCOMES = "outcomes"
CANDIDATES = "candidates"
HITS = "hits"
ORACLE = "oracle"
ERROR = "error_"

_ORDERED = ("ranked", "uncalibrated")
"""Fan-outs whose first N outcomes are those that they would have chosen with N branches."""


def sizes_of(fan_out: str, branches: int) -> tuple[int, ...]:
    """The N for which an engine of so many branches says what N branches would have hit."""
    smaller = [size for size in SIZES if size < branches] if fan_out in _ORDERED else []
    return (*smaller, branches)


class ForecastProbe:
    """Looks at every outcome that a forecaster learns from.

    `hits@N`: the outcome was among the first N of the forecast. `oracle@N`: its token was among the N candidates of the
    highest score at its position, which is what N branches could have had if k had been known before. `candidates`: the
    token was a candidate there, whatever its score.
    """

    def __init__(self, fan_out: str, branches: int) -> None:
        self.sizes = sizes_of(fan_out, branches)
        names = [OUTCOMES, CANDIDATES, *(f"{what}@{size}" for what in (HITS, ORACLE) for size in self.sizes)]
        self.counts = dict.fromkeys(names, 0.0)

    def wrap(self, learn: Callable[..., int | None]) -> Callable[..., int | None]:
        """The same `Forecaster.learn`, watched."""

        def watched(forecast: Forecast, accepted: int, bonus: int, verified: int) -> int | None:
            rank = learn(forecast, accepted, bonus, verified)
            # A pass that the scheduler cut short says nothing of the token after the last draft that it had.
            if accepted < verified or verified == len(forecast.accept):
                self._count(forecast, accepted, bonus, rank)
            return rank

        return watched

    def _count(self, forecast: Forecast, accepted: int, bonus: int, rank: int | None) -> None:
        self.counts[OUTCOMES] += 1
        place = (forecast.tokens[accepted] == bonus).nonzero()[0]
        best: int | None = None
        if place.size:
            self.counts[CANDIDATES] += 1
            scores = forecast.scores[accepted]
            score = scores[place[0]]
            best = int((scores > score).sum()) if score > 0 else None  # 0: it was held to be impossible
        for what, found in ((HITS, rank), (ORACLE, best)):
            for size in self.sizes:
                self.counts[f"{what}@{size}"] += found is not None and found < size


def calibration_errors(calibration: Any) -> dict[str, float]:
    """The expected error of what a `Calibration` predicted of each kind of event, where it has seen some."""
    from vllm_saguaro.algorithm.calibration import Event  # imports torch

    errors = {f"{ERROR}{what.name.lower()}": calibration.calibration_error(None, what) for what in Event}
    return {name: error for name, error in errors.items() if not math.isnan(error)}


def over_repetitions(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts added up, errors averaged over the repetitions that have them."""
    total = counters.added(tables)
    for name in total:
        if name.startswith(ERROR):
            total[name] /= sum(name in table for table in tables)
    return total


def shares(table: Mapping[str, float], what: str) -> dict[int, float]:
    """By N, the share of all outcomes: of `HITS` or of `ORACLE`."""
    outcomes = table.get(OUTCOMES, 0)
    if not outcomes:
        return {}
    found = {name.partition("@"): value for name, value in table.items()}
    return {int(size): value / outcomes for (kind, _, size), value in found.items() if kind == what}
