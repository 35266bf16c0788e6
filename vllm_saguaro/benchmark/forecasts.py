"""What the draft side believed of each outcome, against what happened and the best that N branches could have done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_saguaro.benchmark import counters

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_saguaro.drafting.forecast import Forecast, Forecaster

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of branches for which shares are counted, as far as the engine has them."""

OUTCOMES = "outcomes"
CANDIDATES = "candidates"
HITS = "hits"
PREDICTED = "predicted"
ORACLE = "oracle"

HIT_BINS = "bin_"
ACCEPTANCE_BINS = "accept_bin_"
"""Counts by what was predicted: `{bins}count_i`, `{bins}predicted_i` and `{bins}hits_i` (the event took place)."""

BINS = 10
"""Bins of equal width over the predicted probability."""

_ORDERED = ("ranked", "uncalibrated")
"""Fan-outs whose first N outcomes are those that they would have chosen with N branches."""

_OLD_ERROR = "error_"
"""Older reports have averages under such names, which are no counts, and not of what the choice was made by."""


def sizes_of(fan_out: str, branches: int) -> tuple[int, ...]:
    """The N for which an engine of so many branches says what N branches would have hit."""
    smaller = [size for size in SIZES if size < branches] if fan_out in _ORDERED else []
    return (*smaller, branches)


@dataclass(frozen=True, slots=True)
class Belief:
    """The probabilities that a table gives to the events of one forecast.

    accept [n]: each draft is accepted, once those before it are. ranked [R]: each ranked outcome happens.
    """

    accept: np.ndarray
    ranked: np.ndarray

    @classmethod
    def of(cls, forecast: Forecast, table: Tensor) -> Belief:
        """By the same functions as the choice itself."""
        import torch

        from vllm_saguaro.algorithm.calibration import Event, apply
        from vllm_saguaro.algorithm.outcomes import NO_TOKEN, Beliefs, Scores, outcome_log_probabilities

        accept = torch.tensor(forecast.accept, dtype=torch.float32)[None]
        scores = torch.tensor(forecast.scores, dtype=torch.float32)[None]
        unknown = torch.full_like(scores, math.nan)  # a forecast keeps neither shares nor drafts: nobody may look
        beliefs = Beliefs(
            tokens=torch.tensor(forecast.tokens)[None],
            share=unknown,
            drawn=unknown,
            drafts=torch.full(accept.shape, NO_TOKEN),
            n=torch.tensor([accept.shape[1]]),
            classes=torch.tensor([forecast.cls]),
        )
        log_probability = outcome_log_probabilities(beliefs, Scores(accept, scores), table)[0]
        pairs = np.array(forecast.ranked, dtype=np.int64).reshape(-1, 2)
        is_it = forecast.tokens[pairs[:, 0]] == pairs[:, 1:]
        return cls(
            apply(table, beliefs.classes, Event.ACCEPTANCE, accept)[0].double().numpy(),
            np.where(is_it, log_probability.double().exp().numpy()[pairs[:, 0]], 0.0).sum(axis=1),
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a forecast came to, and the maps that it was made by."""

    forecast: Forecast
    table: Tensor
    accepted: int
    bonus: int
    verified: int
    rank: int | None


class ForecastProbe:
    """Looks at every outcome that a forecaster learns from.

    `hits@N`: the outcome was among the first N of the forecast. `predicted@N`: how likely that was held to be, added
    up. `oracle@N`: its token was among the N candidates of the highest score at its position, which is what N branches
    could have had if k had been known before. `candidates`: the token was a candidate there, whatever its score.
    Besides, how often things happened that were held to be so likely: hits with all branches, and acceptances.
    """

    def __init__(self, forecaster: Forecaster, branches: int) -> None:
        self._forecaster = forecaster
        self._branches = branches
        self.sizes = sizes_of(forecaster.fan_out, branches)
        names = [OUTCOMES, CANDIDATES, *(f"{what}@{size}" for what in (HITS, PREDICTED, ORACLE) for size in self.sizes)]
        for bins in (HIT_BINS, ACCEPTANCE_BINS):
            names += [f"{bins}{part}_{i}" for part in ("count", "predicted", "hits") for i in range(BINS)]
        self._counts = dict.fromkeys(names, 0.0)
        self._waiting: list[_Outcome] = []

    def wrap(self, learn: Callable[..., int | None]) -> Callable[..., int | None]:
        """The same `learn` of the forecaster, watched."""

        def watched(forecast: Forecast, accepted: int, bonus: int, verified: int) -> int | None:
            # Before it learns from this outcome. From those of other requests it may have learnt since the choice was
            # made: a few events among thousands.
            table = self._table()
            rank = learn(forecast, accepted, bonus, verified)
            self._waiting.append(_Outcome(forecast, table, accepted, bonus, verified, rank))
            return rank

        return watched

    def counts(self) -> dict[str, float]:
        """What was counted until now. The work is done here, where nobody measures the time: a table never changes."""
        for outcome in self._waiting:
            self._judge(outcome)
        self._waiting.clear()
        return dict(self._counts)

    def _table(self) -> Tensor:
        """The maps by which the forecaster chooses."""
        if self._forecaster.fan_out == "uncalibrated":
            return self._forecaster._untaught
        return self._forecaster.calibration.table()

    def _judge(self, outcome: _Outcome) -> None:
        belief = Belief.of(outcome.forecast, outcome.table)
        for j in range(min(outcome.accepted + 1, outcome.verified)):
            self._put(ACCEPTANCE_BINS, float(belief.accept[j]), j < outcome.accepted)
        # A pass that the scheduler cut short says nothing of the token after the last draft that it had; to count only
        # its rejections would be to choose by the outcome.
        if outcome.verified < len(outcome.forecast.accept):
            return
        self._counts[OUTCOMES] += 1
        scores = outcome.forecast.scores[outcome.accepted]
        place = (outcome.forecast.tokens[outcome.accepted] == outcome.bonus).nonzero()[0]
        best: int | None = None
        if place.size:
            self._counts[CANDIDATES] += 1
            score = scores[place[0]]
            best = int((scores > score).sum()) if score > 0 else None  # 0: it was held to be impossible
        for what, found in ((HITS, outcome.rank), (ORACLE, best)):
            for size in self.sizes:
                self._counts[f"{what}@{size}"] += found is not None and found < size
        for size in self.sizes:
            self._counts[f"{PREDICTED}@{size}"] += float(belief.ranked[:size].sum())
        hit = outcome.rank is not None and outcome.rank < self._branches
        self._put(HIT_BINS, float(belief.ranked[: self._branches].sum()), hit)

    def _put(self, bins: str, predicted: float, happened: bool) -> None:
        i = min(int(predicted * BINS), BINS - 1)
        self._counts[f"{bins}count_{i}"] += 1
        self._counts[f"{bins}predicted_{i}"] += predicted
        self._counts[f"{bins}hits_{i}"] += happened


def over_repetitions(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The counts of all repetitions."""
    total = counters.added(tables)
    return {name: value for name, value in total.items() if not name.startswith(_OLD_ERROR)}


def shares(table: Mapping[str, float], what: str) -> dict[int, float]:
    """By N, the share of all outcomes: of `HITS`, `PREDICTED` or `ORACLE`."""
    outcomes = table.get(OUTCOMES, 0)
    if not outcomes:
        return {}
    found = {name.partition("@"): value for name, value in table.items()}
    return {int(size): value / outcomes for (kind, _, size), value in found.items() if kind == what}


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """sum_i |predicted_i - hits_i| over bins i, as a share of the events; `noise` is what perfect forecasts show."""

    error: float
    noise: float

    @classmethod
    def of(cls, table: Mapping[str, float], bins: str) -> CalibrationError | None:
        """Of `HIT_BINS` or `ACCEPTANCE_BINS`; None where nothing was counted.

        The hits of a bin are about normal with the variance n p (1 - p), of which the mean distance is
        sqrt(2 / pi n p (1 - p)).
        """
        total = error = noise = 0.0
        for i in range(BINS):
            count, predicted, hits = (table.get(f"{bins}{part}_{i}", 0.0) for part in ("count", "predicted", "hits"))
            if count:
                total += count
                error += abs(predicted - hits)
                noise += math.sqrt(2 / math.pi * max(predicted * (1 - predicted / count), 0.0))
        return cls(error / total, noise / total) if total else None
