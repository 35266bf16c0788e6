"""How many branches a round gets, and when its table is as deep as it gets in time, by what rounds took so far."""

from __future__ import annotations

from itertools import pairwise

from vllm_saguaro.algorithm.measured import LinearTime, Mean
from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.algorithm.timing import SLACK, DraftTimes, best_branches, comes_too_late

CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""N that are considered."""

_AT_FIRST = 12
_PRIOR_ACCEPTANCE = 0.7
_PRIOR_MISS_EXPONENT = 0.87
"""The paper's power law, 1 - hit(N) = N^-r (Definition 11), until there is a measured curve."""
_ROUNDS_TO_KNOW = 8
_MEASURED_WEIGHT = 4
"""What was measured before the start weighs so many times what is assumed; it fades likewise."""
_LINE_WEIGHT = 64.0
"""The slope of a step that was measured before counts like a spread of eight rows."""


class Pace:
    """Measured times and hit rates of one draft side, and the N that follows from them."""

    def __init__(self, steps: int, most: int, chooses: bool, priors: Priors | None = None) -> None:
        """`steps`: K. `most`: N at most; N always, where `chooses` is False. `priors`: what to begin with."""
        self._steps, self._most, self._chooses = steps, most, chooses
        self._choices = [n for n in CHOICES if n < most] + [most]
        self._glue = Mean(0.0, prior_weight=1e-6, decay=0.9)
        self._step = LinearTime(0.0, 0.0)
        self._round = LinearTime(0.0, 0.0)
        self._available = Mean(0.0, prior_weight=1e-6, decay=0.9)
        self._hits = {n: Mean(1 - n**-_PRIOR_MISS_EXPONENT, prior_weight=20.0, decay=0.998) for n in self._choices}
        self._accepted = [Mean(_PRIOR_ACCEPTANCE, prior_weight=4.0, decay=0.99) for _ in range(steps)]
        self._rounds = 0
        self._priors = priors
        if priors is not None:
            self._glue = Mean(priors.glue, decay=0.9)
            self._step = LinearTime(*priors.draft_step, prior_weight=_LINE_WEIGHT)
            for n in self._choices:
                self._hits[n] = Mean(priors.hit_rate(n), prior_weight=20.0 * _MEASURED_WEIGHT, decay=0.998)
            chances = priors.chances(steps)
            self._accepted = [Mean(chance, prior_weight=4.0 * _MEASURED_WEIGHT, decay=0.99) for chance in chances]

    def observe_glue(self, seconds: float) -> None:
        """From the outcome to the first decode step."""
        self._glue.observe(seconds)

    def observe_step(self, rows: int, seconds: float) -> None:
        """One decode step over so many rows."""
        self._step.observe(rows, seconds)

    def observe_round(self, tokens: float, seconds: float) -> None:
        """A round of the target over so many tokens a request, from outcomes to outcomes."""
        self._round.observe(tokens, seconds)
        self._available.observe(seconds)
        self._rounds += 1

    def round_time(self, tokens: float) -> float:
        """Seconds of a round of the target over so many tokens a request; 0 as long as nothing is known."""
        return self._round.at(tokens)

    def too_late(self, rows: int, tokens: float, elapsed: float) -> bool:
        """Whether a decode step over `rows` rows would be under way when the next outcome comes (`comes_too_late`).

        `tokens`: of a request, in the target's pass; `elapsed`: seconds since the last outcome.
        """
        return comes_too_late(self._step.at(rows), self.round_time(tokens), elapsed)

    def observe_forecast(self, rank: int | None, accepted: int, verified: int) -> None:
        """The rank of the real outcome among the predicted ones (from 0; None: not there), and what was accepted."""
        for n, mean in self._hits.items():
            mean.observe(float(rank is not None and rank < n))
        for j in range(min(accepted + 1, verified, self._steps)):
            self._accepted[j].observe(float(j < accepted))

    def branches(self, batch: int) -> int:
        """N for each of `batch` requests that are drafted for together."""
        if not self._chooses:
            return self._most
        available = self._available.value
        if self._rounds < _ROUNDS_TO_KNOW:
            if self._priors is None:
                return min(_AT_FIRST, self._most)
            available = self._priors.target_seconds(batch * (1 + self._steps))
        times = DraftTimes(self._glue.value, self._step.base, self._step.per_unit)
        hits = {n: mean.value for n, mean in self._hits.items()}
        return best_branches(times, SLACK * available, batch, self._steps, self.reach(), hits, self._choices)

    def reach(self) -> list[float]:
        """P(at least j drafts are accepted), j = 1 .. K."""
        reach, chance = [], 1.0
        for mean in self._accepted:
            chance *= mean.value
            reach.append(chance)
        return reach

    def accepted_lengths(self) -> list[float]:
        """P(k), k = 0 .. K."""
        reach = [1.0, *self.reach(), 0.0]
        return [here - beyond for here, beyond in pairwise(reach)]
