"""Which Saguaro sampling the next trees draw with: F of each position, and C. SSD paper, section 4.2.

A smaller C makes the bonus token of a rejection more predictable, and drafts less acceptable. What it is worth is
measured: each C keeps the accepted drafts A and the hit rate H of the speculations that were drawn with it, and the one
with the most tokens per round, 1 + H A, is used; now and then another, so that all stay known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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
        self._random = random.Random(seed)  # of its own: it decides how to draw, never what
        self._hits = {c: Mean(h, prior_weight=_PRIOR_ROUNDS, decay=0.998) for c, (h, _) in _PRIORS.items()}
        self._accepted = {c: Mean(a, prior_weight=_PRIOR_ROUNDS, decay=0.998) for c, (_, a) in _PRIORS.items()}

    @property
    def chosen(self) -> float:
        """The C that is best so far, or the user's."""
        if self._fixed is not None:
            return self._fixed
        return max(_PRIORS, key=lambda c: self._hits[c].value * self._accepted[c].value)

    def next(self, accepted_lengths: Sequence[float], branches: int) -> Deflation:
        """The rule for one tree: C, and F by the fan-out that suits the accepted lengths P(k) [K + 1]."""
        c = self.chosen
        if self._fixed is None and self._random.random() < _TRY_ANOTHER:
            c = self._random.choice(list(_PRIORS))
        if c == 1:
            return PLAIN
        return Deflation(tuple(fan_out_from_lengths(accepted_lengths, branches, _EXPONENT)[: self._steps]), c)

    def learn(self, c: float, accepted: int, hit: bool) -> None:
        """What came of a speculation drawn with `c`: drafts accepted, and whether its outcome was predicted."""
        if c in self._hits:
            self._accepted[c].observe(accepted)
            self._hits[c].observe(float(hit))
