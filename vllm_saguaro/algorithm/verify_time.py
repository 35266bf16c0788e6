"""How long a verify pass takes, by its requests and by the drafts in it, as measured while serving."""

from __future__ import annotations

import numpy as np

_FIRST_DEVIATION = 0.5  # of the first time
_LEAST_DEVIATION = 0.05  # of the expected time
_OWN_WEIGHT = 64.0
"""What a request, or a draft of one that samples, costs beyond a token is taken to be nothing until passes tell, by a
spread of about eight."""


class VerifyTime:
    """The time t = base + per_token (rows + drafts) + per_row rows + per_drawn drawn, by least squares that forget.

    A request in a pass costs more than a draft: its own attention, its sampling, the host's work for it; and a draft of
    a request that samples (`drawn` counts those) more than a greedy one. A line over all tokens would take what
    requests cost for what drafts cost where the number of requests changes, and never verify any again. No part of it
    is ever negative: slopes that would be are left out, approximately the best fit without them.

    Before anything is observed it is the prior, without the last two; that counts like a spread of `prior_weight` (in
    tokens squared) in the observations. Of the slopes only as much is forgotten as an observation tells anew, in its
    own direction: passes without drafts do not unlearn what drafts cost, nor those of one batch what requests cost. An
    observation far from what is expected, by more than `clip` times the mean deviation, is taken as if it lay that far.

    Raises ValueError if `decay` lies outside of (0, 1], the prior is negative or has no weight.
    """

    def __init__(
        self, base: float, per_token: float, *, prior_weight: float = 1.0, decay: float = 0.98, clip: float = 4.0
    ) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"a decay lies above 0 and not above 1, not at {decay}")
        if min(base, per_token) < 0:
            raise ValueError(f"neither part of a prior is negative: {min(base, per_token)}")
        if prior_weight <= 0:
            raise ValueError(f"the prior must have some weight, not {prior_weight}")
        self._decay, self._clip = decay, clip
        self._weights = np.array([prior_weight, _OWN_WEIGHT, _OWN_WEIGHT])
        self._weighted_prior = np.array([prior_weight * per_token, 0.0, 0.0])
        self._count = 0.0
        self._deviation = 0.0
        self._means, self._mean_seconds = np.zeros(3), 0.0
        self._spread, self._with_seconds = np.zeros((3, 3)), np.zeros(3)
        self._base, self._slopes = base, np.array([per_token, 0.0, 0.0])

    def observe(self, rows: float, drafts: float, drawn: float, seconds: float) -> None:
        """Take in that a pass over so many requests with so many drafts, `drawn` of them sampled, took so long.

        Raises ValueError if one of them is negative or the time is not finite.
        """
        if min(rows, drafts, drawn, seconds) < 0:
            raise ValueError(f"neither times nor sizes are negative: {min(rows, drafts, drawn, seconds)}")
        if not np.isfinite(seconds):
            raise ValueError(f"a time must be finite, not {seconds}")
        sizes = np.array([rows + drafts, rows, drawn], dtype=float)
        old = self._decay * self._count
        self._count = old + 1
        if old == 0:
            self._means, self._mean_seconds = sizes, seconds
            self._deviation = seconds * _FIRST_DEVIATION  # nothing is known of the spread: assume much
        else:
            expected = self.at(rows, drafts, drawn)
            # What fits to the last digit would follow no change: the mean deviation counts as some of the time
            most = self._clip * max(self._deviation, _LEAST_DEVIATION * expected)
            residual = min(max(seconds - expected, -most), most)
            self._deviation += (abs(residual) - self._deviation) / self._count
            self._learn(sizes - self._means, expected + residual - self._mean_seconds, old / self._count)
        self._solve()

    def _learn(self, d: np.ndarray, dt: float, share: float) -> None:
        """Forget along d, then add it: S' = S - g (S d)(S d)^T / (d^T S d) + share d d^T (Cao, Schwartz 2000).

        `d` [3] and `dt`: how far sizes and seconds lie from their means. `share` = w / (w + 1), the spread of weight w
        and of one more observation.
        """
        along = self._spread @ d
        spread = float(along @ d)
        if spread > 0:
            # g grows with how far out the observation lies in its direction: one in the middle tells nothing
            gone = (1 - self._decay ** min(1.0, float(d @ d) ** 2 * self._count / spread)) / spread
            self._with_seconds -= gone * float(self._with_seconds @ d) * along
            self._spread -= gone * np.outer(along, along)
        self._spread += share * np.outer(d, d)
        self._with_seconds += share * dt * d
        self._means = self._means + d / self._count
        self._mean_seconds += dt / self._count

    def _solve(self) -> None:
        """Least squares with the prior in them; what would be negative is left out."""
        spread = self._spread + np.diag(self._weights)
        right = self._with_seconds + self._weighted_prior
        kept = [0, 1, 2]
        slopes = np.zeros(3)
        while kept:
            found = np.linalg.solve(spread[np.ix_(kept, kept)], right[kept])
            if found.min() >= 0:
                slopes[kept] = found
                break
            del kept[int(found.argmin())]
        above = float(slopes @ self._means)
        if self._mean_seconds < above:  # a negative base: through the origin instead, and through the mean
            slopes *= self._mean_seconds / above
        self._base, self._slopes = max(0.0, self._mean_seconds - above), slopes

    def at(self, rows: float, drafts: float = 0.0, drawn: float = 0.0) -> float:
        """The time to expect, in seconds."""
        per_token, per_row, per_drawn = self._slopes.tolist()
        return float(self._base + per_token * (rows + drafts) + per_row * rows + per_drawn * drawn)

    def per_draft(self, drawn: float = 0.0) -> float:
        """Seconds that each draft adds, where this share of them is sampled."""
        return float(self._slopes[0] + drawn * self._slopes[2])
