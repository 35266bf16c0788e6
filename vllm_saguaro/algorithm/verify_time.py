"""How long a verify pass takes, by its requests and by the drafts in it, as measured while serving."""

from __future__ import annotations

from math import isfinite

_FIRST_DEVIATION = 0.5  # of the first time
_LEAST_DEVIATION = 0.05  # of the expected time
_ROW_WEIGHT = 64.0
"""What a request costs beyond its token is taken to be nothing until passes tell, by a spread of about eight."""


class VerifyTime:
    """The plane t = base + per_token (rows + drafts) + per_row rows, by least squares that forget; nothing is negative.

    A request in a pass costs more than a draft does: its own attention, its sampling, the host's work for it. Where the
    number of requests changes and few drafts are verified, a line over all tokens would take that for what a draft
    costs, and never verify any again.

    Before anything is observed it is the prior, with per_row = 0; that counts like a spread of `prior_weight` (in
    tokens squared) in the observations. Of the slopes only as much is forgotten as an observation tells anew, in its
    own direction: passes without drafts do not unlearn what drafts cost, nor those of one batch what requests cost. An
    observation far from the plane, by more than `clip` times the mean deviation, is taken as if it lay that far.

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
        self._prior, self._prior_weight, self._decay, self._clip = (base, per_token), prior_weight, decay, clip
        self._count = 0.0
        self._deviation = 0.0
        self._mean = (0.0, 0.0, 0.0)  # tokens, rows, seconds
        # What the least squares need: spreads of tokens and rows (xx, xy, yy), and of each with the seconds (xt, yt)
        self._xx = self._xy = self._yy = self._xt = self._yt = 0.0
        self._plane = (base, per_token, 0.0)

    def observe(self, rows: float, drafts: float, seconds: float) -> None:
        """Take in that a pass over so many requests with so many drafts took so long.

        Raises ValueError if one of them is negative or the time is not finite.
        """
        if min(rows, drafts, seconds) < 0:
            raise ValueError(f"neither times nor sizes are negative: {min(rows, drafts, seconds)}")
        if not isfinite(seconds):
            raise ValueError(f"a time must be finite, not {seconds}")
        old = self._decay * self._count
        self._count = old + 1
        if old == 0:
            self._mean = (rows + drafts, rows, seconds)
            self._deviation = seconds * _FIRST_DEVIATION  # nothing is known of the spread: assume much
        else:
            expected = self.at(rows, drafts)
            # A plane that fits to the last digit would follow no change: the mean deviation counts as some of the time
            most = self._clip * max(self._deviation, _LEAST_DEVIATION * expected)
            residual = min(max(seconds - expected, -most), most)
            self._deviation += (abs(residual) - self._deviation) / self._count
            tokens, own, mean = self._mean
            self._learn(rows + drafts - tokens, rows - own, expected + residual - mean, old / self._count)
        self._plane = self._solved()

    def _learn(self, dx: float, dy: float, dt: float, share: float) -> None:
        """Forget along (dx, dy), then add it: S' = S - g (S d)(S d)^T / (d^T S d) + share d d^T (Cao, Schwartz 2000).

        `share` = w / (w + 1), the spread of weight w and of one more observation.
        """
        along_x, along_y = self._xx * dx + self._xy * dy, self._xy * dx + self._yy * dy
        spread, length = along_x * dx + along_y * dy, dx * dx + dy * dy
        if spread > 0:
            # g grows with how far out the observation lies in its direction: one in the middle tells nothing
            gone = (1 - self._decay ** min(1.0, length * length * self._count / spread)) / spread
            seen = self._xt * dx + self._yt * dy
            self._xx -= gone * along_x * along_x
            self._xy -= gone * along_x * along_y
            self._yy -= gone * along_y * along_y
            self._xt -= gone * along_x * seen
            self._yt -= gone * along_y * seen
        self._xx += share * dx * dx
        self._xy += share * dx * dy
        self._yy += share * dy * dy
        self._xt += share * dx * dt
        self._yt += share * dy * dt
        tokens, rows, seconds = self._mean
        self._mean = (tokens + dx / self._count, rows + dy / self._count, seconds + dt / self._count)

    def _solved(self) -> tuple[float, float, float]:
        """base, per_token, per_row: the least squares with the prior in them, no part below 0."""
        xx, yy = self._xx + self._prior_weight, self._yy + _ROW_WEIGHT
        xt, yt = self._xt + self._prior_weight * self._prior[1], self._yt
        scale = xx * yy - self._xy * self._xy
        per_token, per_row = (xt * yy - yt * self._xy) / scale, (yt * xx - xt * self._xy) / scale
        if per_row < 0:
            per_token, per_row = max(0.0, xt / xx), 0.0
        elif per_token < 0:
            per_token, per_row = 0.0, max(0.0, yt / yy)
        tokens, rows, seconds = self._mean
        above = per_token * tokens + per_row * rows
        if seconds < above:  # a negative base: the plane through the origin instead, and through the mean
            return 0.0, per_token * seconds / above, per_row * seconds / above
        return seconds - above, per_token, per_row

    def at(self, rows: float, drafts: float = 0.0) -> float:
        """The time to expect, in seconds."""
        base, per_token, per_row = self._plane
        return base + per_token * (rows + drafts) + per_row * rows

    @property
    def per_draft(self) -> float:
        """Seconds that each draft adds."""
        return self._plane[1]
