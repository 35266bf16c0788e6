"""How long a verify pass takes, by its requests and by the drafts in it, as measured while serving."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_saguaro.algorithm.measured import ClippedTimes, check_prior, not_negative

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
    own direction: passes without drafts do not unlearn what drafts cost, nor those of one batch what requests cost. Of
    those far from what is expected see `ClippedTimes`. It is observed in each step, between the outcomes and the drafts
    for them: numpy takes three times as long for sizes of three.

    Raises ValueError if `decay` lies outside of (0, 1], the prior is negative or has no weight.
    """

    def __init__(
        self, base: float, per_token: float, *, prior_weight: float = 1.0, decay: float = 0.98, clip: float = 4.0
    ) -> None:
        check_prior(base, per_token, prior_weight)
        self._decay = decay
        self._times = ClippedTimes(decay, clip)
        self._weights = (prior_weight, _OWN_WEIGHT, _OWN_WEIGHT)
        self._weighted_prior = (prior_weight * per_token, 0.0, 0.0)
        self._means, self._mean_seconds = [0.0] * 3, 0.0
        self._spread, self._with_seconds = [[0.0] * 3 for _ in range(3)], [0.0] * 3
        self._base, self._slopes = base, [per_token, 0.0, 0.0]

    def observe(self, rows: float, drafts: float, drawn: float, seconds: float) -> None:
        """Take in that a pass over so many requests with so many drafts, `drawn` of them sampled, took so long.

        Raises ValueError if one of them is negative or the time is not finite.
        """
        not_negative(rows, drafts, drawn, seconds)
        dt = self._times.take(seconds, self.at(rows, drafts, drawn)) - self._mean_seconds
        d = [size - mean for size, mean in zip((rows + drafts, rows, drawn), self._means, strict=True)]
        self._learn(d, dt)
        count = self._times.count
        self._means = [mean + own / count for mean, own in zip(self._means, d, strict=True)]
        self._mean_seconds += dt / count
        self._solve()

    def _learn(self, d: Sequence[float], dt: float) -> None:
        """Forget along d, then add it: S' = S - g (S d)(S d)^T / (d^T S d) + share d d^T (Cao, Schwartz 2000).

        `d` [3] and `dt`: how far sizes and seconds lie from their means.
        """
        along, gone = [_dot(row, d) for row in self._spread], 0.0
        spread = _dot(along, d)
        if spread > 0:
            # g grows with how far out the observation lies in its direction: one in the middle tells nothing
            gone = (1 - self._decay ** min(1.0, _dot(d, d) ** 2 * self._times.count / spread)) / spread
        share, seen = self._times.share, _dot(self._with_seconds, d)
        for i, row in enumerate(self._spread):
            for j in range(3):
                row[j] += share * d[i] * d[j] - gone * along[i] * along[j]
            self._with_seconds[i] += share * dt * d[i] - gone * seen * along[i]

    def _solve(self) -> None:
        """Least squares with the prior in them; what would be negative is left out."""
        kept, slopes = [0, 1, 2], [0.0] * 3
        while kept:
            spread = [[self._spread[i][j] + (self._weights[i] if i == j else 0.0) for j in kept] for i in kept]
            found = _solved(spread, [self._with_seconds[i] + self._weighted_prior[i] for i in kept])
            least = min(found)
            if least >= 0:
                for i, slope in zip(kept, found, strict=True):
                    slopes[i] = slope
                break
            del kept[found.index(least)]
        above = _dot(slopes, self._means)
        if self._mean_seconds < above:  # a negative base: through the origin instead, and through the mean
            slopes = [slope * self._mean_seconds / above for slope in slopes]
        self._base, self._slopes = max(0.0, self._mean_seconds - above), slopes

    def at(self, rows: float, drafts: float = 0.0, drawn: float = 0.0) -> float:
        """The time to expect, in seconds."""
        per_token, per_row, per_drawn = self._slopes
        return self._base + per_token * (rows + drafts) + per_row * rows + per_drawn * drawn

    def per_draft(self, drawn: float = 0.0) -> float:
        """Seconds that each draft adds, where this share of them is sampled."""
        return self._slopes[0] + drawn * self._slopes[2]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix x = right, in the place of `right`. The matrix is positive definite, so no pivots are looked for."""
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            for k in range(i, size):
                matrix[j][k] -= factor * matrix[i][k]
            right[j] -= factor * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][k] * right[k] for k in range(i + 1, size))) / matrix[i][i]
    return right
