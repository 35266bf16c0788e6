"""What is measured while serving, in a few floats each: means and pass times that forget."""

from __future__ import annotations

from math import isfinite

_FIRST_DEVIATION = 0.5  # of the first time
_LEAST_DEVIATION = 0.05  # of the expected time


class Mean:
    """A mean that forgets: each observation weighs `decay` times what the next one weighs.

    Before anything is observed it is `prior`, which counts as `prior_weight` observations and fades like them. Raises
    ValueError if `decay` lies outside of (0, 1] or the weight of the prior is not positive.
    """

    def __init__(self, prior: float, prior_weight: float = 1.0, decay: float = 0.98) -> None:
        check_decay(decay)
        if prior_weight <= 0:
            raise ValueError(f"the prior must have some weight, not {prior_weight}")
        self.count = 0.0  # observations in memory: at most 1 / (1 - decay), the prior not among them
        self._decay = decay
        self._weight = prior_weight
        self._total = prior * prior_weight

    def observe(self, value: float, weight: float = 1.0) -> None:
        """Take in `value`, the mean of `weight` observations: 3 hits in 4 rows are observe(0.75, 4).

        Nothing changes at weight 0. Raises ValueError if the weight is negative.
        """
        not_negative(weight)
        kept = self._decay**weight
        # What `weight` single observations of the same value add: 1 + d + ... + d^(weight - 1)
        added = weight if self._decay == 1 else (1 - kept) / (1 - self._decay)
        self.count = kept * self.count + added
        self._weight = kept * self._weight + added
        self._total = kept * self._total + added * value

    @property
    def value(self) -> float:
        """The mean, or the prior."""
        return self._total / self._weight


class ClippedTimes:
    """Times as far as they are believed, each weighing `decay` times what the next one weighs.

    One that is far from what was expected, by more than `clip` times the mean deviation, is taken as if it lay that
    far: a hiccup changes little, a lasting change is followed since it raises the mean deviation too. Raises ValueError
    if `decay` lies outside of (0, 1].
    """

    def __init__(self, decay: float, clip: float) -> None:
        check_decay(decay)
        self._decay, self._clip = decay, clip
        self.count = 0.0
        """Times in memory, the newest among them."""
        self._deviation = 0.0

    def take(self, seconds: float, expected: float) -> float:
        """`seconds` as it is believed; the first time is, whatever was expected. Raises ValueError if infinite."""
        if not isfinite(seconds):
            raise ValueError(f"a time must be finite, not {seconds}")
        first = self.count == 0
        self.count = self._decay * self.count + 1
        if first:
            self._deviation = seconds * _FIRST_DEVIATION  # nothing is known of the spread: assume much
            return seconds
        # What fits to the last digit would follow no change: the mean deviation counts as some of the time
        most = self._clip * max(self._deviation, _LEAST_DEVIATION * expected)
        residual = min(max(seconds - expected, -most), most)
        self._deviation += (abs(residual) - self._deviation) / self.count
        return expected + residual

    @property
    def share(self) -> float:
        """w / (w + 1), where w is the weight of all times but the newest: what that one adds to a spread."""
        return 1 - 1 / self.count


class LinearTime:
    """The line t = base + per_unit * x through measured times, by least squares that forget; neither is ever negative.

    For the passes of a model, x is the number of tokens or rows. Before anything is observed the line is the prior;
    after one observation it goes through that with the prior's slope, which then counts like a spread of
    `prior_weight` (in units of x squared) in the observations. Of those far from the line see `ClippedTimes`.

    Raises ValueError if `decay` lies outside of (0, 1], the prior is negative or has no weight.
    """

    def __init__(
        self, base: float, per_unit: float, *, prior_weight: float = 1.0, decay: float = 0.98, clip: float = 4.0
    ) -> None:
        check_prior(base, per_unit, prior_weight)
        self._prior, self._prior_weight, self._decay = (base, per_unit), prior_weight, decay
        self._times = ClippedTimes(decay, clip)
        self._mean_x = self._mean_t = 0.0
        self._spread_xx = self._spread_xt = 0.0

    def observe(self, x: float, seconds: float) -> None:
        """Take in that a pass of size x took so many seconds. Raises ValueError if x or the time is negative."""
        not_negative(x, seconds)
        dx, dt = x - self._mean_x, self._times.take(seconds, self.at(x)) - self._mean_t
        count, share = self._times.count, self._times.share
        # Of the slope forget only as much as this observation tells anew: passes of one size tell nothing, and a server
        # that sees them for long must not lose its slope
        variance = self._spread_xx / count
        kept = self._decay ** (min(1.0, dx * dx / variance) if variance > 0 else 0.0)
        # S' = d S + (w / (w + 1)) (x - mean) (t - mean), the spread of weight w and of one more observation
        self._spread_xx = kept * self._spread_xx + share * dx * dx
        self._spread_xt = kept * self._spread_xt + share * dx * dt
        self._mean_x += dx / count
        self._mean_t += dt / count

    def at(self, x: float) -> float:
        """The time to expect for size x, in seconds."""
        base, per_unit = self._line()
        return base + per_unit * x

    @property
    def base(self) -> float:
        """Seconds of a pass of size 0."""
        return self._line()[0]

    @property
    def per_unit(self) -> float:
        """Seconds that each token or row adds."""
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        if self._times.count == 0:
            return self._prior
        weight = self._prior_weight
        slope = max(0.0, (self._spread_xt + weight * self._prior[1]) / (self._spread_xx + weight))
        base = self._mean_t - slope * self._mean_x
        # A negative base: the line through the origin instead, and through the mean
        return (base, slope) if base >= 0 else (0.0, self._mean_t / self._mean_x)


def check_decay(decay: float) -> None:
    """Raises ValueError if it lies outside of (0, 1]."""
    if not 0 < decay <= 1:
        raise ValueError(f"a decay lies above 0 and not above 1, not at {decay}")


def check_prior(base: float, slope: float, weight: float) -> None:
    """Raises ValueError if a part of a prior is negative or it has no weight."""
    if min(base, slope) < 0:
        raise ValueError(f"neither part of a prior is negative: {min(base, slope)}")
    if weight <= 0:
        raise ValueError(f"the prior must have some weight, not {weight}")


def not_negative(*values: float) -> None:
    """Raises ValueError if one of them is."""
    if min(values) < 0:
        raise ValueError(f"neither times, sizes nor weights are negative: {min(values)}")
