"""Which Saguaro sampling the next trees draw with: F of each position, and C. SSD paper, section 4.2.

A smaller C makes the bonus token of a rejection more predictable, and drafts less acceptable. What it is worth is
measured: each C keeps the accepted drafts A and the hit rate H of the speculations that were drawn with it. A round
that begins with a hit verifies n drafts, any other one none, so that the tokens per second are

    (1 + H A) / t(1 + H n)

for a round of t(x) seconds over x tokens. The C with the most is used; now and then another, so that all stay known.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from vllm_saguaro.algorithm.measured import Mean
from vllm_saguaro.algorithm.outcomes import fan_out_from_lengths
from vllm_saguaro.drafting.trunk import PLAIN, Deflation

# (H, A) at N = 24 of a small trained pair, between those of T = 0.7 and T = 1: where the choice begins.
_PRIORS = {1.0: (0.36, 1.48), 0.7: (0.37, 1.48), 0.5: (0.40, 1.48), 0.3: (0.43, 1.45), 0.1: (0.54, 1.14)}
_PRIOR_ROUNDS = 50.0
_TRY_ANOTHER = 0.1
"""Share of the trees that are drawn with a C taken at random."""
_EXPONENT = 1.0
"""r of the power law of the hit rate, for F."""


class Deflations:
    """The choice of C, or the one that the user gave."""

    def __init__(self, steps: int, c: float | str, seed: int = 0) -> None:
        """`c`: a number from 0 to 1, or "auto"."""
        self._steps = steps
        self._fixed = None if isinstance(c, str) else float(c)
        self.chosen: float | None = None
        """C of the newest tree that had tokens to draw, other ones that are merely tried left aside; None: no such tree
        yet."""
        self._random = random.Random(seed)  # of its own: it decides how to draw, never what
        self._hits = {c: Mean(h, prior_weight=_PRIOR_ROUNDS, decay=0.998) for c, (h, _) in _PRIORS.items()}
        self._verified = Mean(float(steps), prior_weight=4.0, decay=0.99)
        self._accepted = {c: Mean(a, prior_weight=_PRIOR_ROUNDS, decay=0.998) for c, (_, a) in _PRIORS.items()}

    def best(self, round_time: Callable[[float], float]) -> float:
        """The C that is best so far, or the user's. `round_time(x)`: seconds of a round over x tokens a request."""
        if self._fixed is not None:
            return self._fixed

        def rate(c: float) -> float:
            hits = self._hits[c].value
            # Before anything is known of the times: the most tokens.
            return (1 + hits * self._accepted[c].value) / (round_time(1 + hits * self._verified.value) or 1.0)

        return max(_PRIORS, key=rate)

    def next(self, accepted_lengths: Sequence[float], branches: int, round_time: Callable[[float], float]) -> Deflation:
        """The rule for one tree: C, and F by the fan-out that suits the accepted lengths P(k) [K + 1]."""
        c = self.chosen = self.best(round_time)
        if self._fixed is None and self._random.random() < _TRY_ANOTHER:
            c = self._random.choice(list(_PRIORS))
        if c == 1:
            return PLAIN
        return Deflation(tuple(fan_out_from_lengths(accepted_lengths, branches, _EXPONENT)[: self._steps]), c)

    def learn(self, c: float, accepted: int, verified: int, hit: bool) -> None:
        """What came of a speculation drawn with `c`: of the verified drafts those accepted, and whether its outcome was
        predicted.
        """
        self._verified.observe(verified)
        if c in self._hits:
            self._accepted[c].observe(accepted)
            self._hits[c].observe(float(hit))
