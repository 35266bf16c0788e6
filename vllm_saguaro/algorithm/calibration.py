"""From the draft model's scores to probabilities: monotone maps, learnt online from what came of earlier rounds.

An outcome (k, t*) is predicted from three kinds of events (SSD paper, section 4.1), each with a raw score in [0, 1]:
a draft token is accepted, a candidate is the bonus token after a rejection, a candidate is the bonus token after all
drafts were accepted. The draft model's own probabilities order these events well, but their size is off, by temperature
and by the rule that the drafts were drawn by. So every class of rows has a map of its own from each kind of score.

A map is a line through BINS nodes over the log-odds of the raw score, x = log(raw / (1 - raw)). Node b, the centre of a
bin, is the mean of a prior (a power map p_b that counts for m_b trials) and of the events around it:

    (m_b p_b + successes_b) / (m_b + trials_b)

made monotone by isotonic regression, so that the noise of a bin with few events never turns the order of two candidates
around. An event counts for the two nodes that its estimate lies between, in the same proportion: else scores that all
lie close together would be judged by a node that never learns from them.

Shapes: B rows, NUM_CLASSES classes, 3 kinds of events.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_saguaro.messages import GREEDY_BELOW

Floats = NDArray[np.float64]


class Event(IntEnum):
    """What a raw score predicts."""

    ACCEPTANCE = 0
    """The draft x_j is accepted, once those before it are."""
    RESIDUAL = 1
    """A candidate is the bonus token, once the draft at its position is rejected."""
    BONUS = 2
    """A candidate is the bonus token, once all drafts are accepted or there were none."""


TEMPERATURES = ("greedy", "T < 0.5", "T < 0.85", "T < 1.15", "T >= 1.15")
RULES = ("certain", "sampled", "coupled")
ORIGINS = ("cache", "backup")
NUM_CLASSES = len(TEMPERATURES) * len(RULES) * len(ORIGINS)

# Where one of TEMPERATURES ends and the next begins. Below the first a request is greedy: vLLM draws the line there.
_TEMPERATURE_EDGES = (GREEDY_BELOW, 0.5, 0.85, 1.15)

# The prior p: log-odds p = slope * log-odds raw + offset, a pair for each rule, greedy rows first. Read
# off what a small trained pair did in 10,000 rounds a cell. A greedy target agrees with a sure draft more often than q
# says. The choice that a known noise makes (score (q e^g)^1.5) is nearly calibrated as it is. What is left of p after a
# rejection is spread wider than q, for drafts that were sampled from q most of all.
PRIOR_LINES: dict[Event, dict[str, tuple[float, float]]] = {
    Event.ACCEPTANCE: {"greedy": (1.45, 1.9), "certain": (1.0, -0.1), "sampled": (0.35, 0.5), "coupled": (0.75, 0.1)},
    Event.RESIDUAL: {"greedy": (1.8, 1.7), "certain": (1.0, -0.6), "sampled": (1.0, -1.1), "coupled": (1.0, 0.0)},
    Event.BONUS: {"greedy": (1.5, 1.4), "certain": (1.0, 0.0), "sampled": (1.0, 0.0), "coupled": (1.0, 0.0)},
}

# The prior of that share, worth `strength` rounds. A greedy target nearly always takes one of a draft's first 64; where
# drafts are sampled from q, a rejection leaves what of p lies outside of q.
PRIOR_COVERAGE: dict[Event, dict[str, float]] = {
    Event.RESIDUAL: {"greedy": 0.99, "certain": 0.9, "sampled": 0.6, "coupled": 0.98},
    Event.BONUS: {"greedy": 0.99, "certain": 0.95, "sampled": 0.95, "coupled": 0.98},
}

BINS = 24
"""Bins of equal width over the log-odds from -9 to 9 nats, open at both ends."""
_EDGE = 9.0
_WIDTH = 2 * _EDGE / BINS
_CENTRES: Floats = -_EDGE + _WIDTH * (np.arange(BINS, dtype=np.float64) + 0.5)
_FIRST = float(_CENTRES[0])

# Above the last centre a map is flat. Below the first it is flat for acceptance, but falls with the score (p ~ raw) for
# candidates: the tail of a sure distribution all lies there, and still has an order to keep.
_TAIL: dict[Event, float] = {Event.ACCEPTANCE: 0.0, Event.RESIDUAL: 1.0, Event.BONUS: 1.0}

LOWEST, HIGHEST = 1e-30, 1 - 1e-6
"""No estimate lies outside of these."""

# Raw scores are moved this far from 0 and 1, so that their log-odds are finite in float32.
_TINY, _ALMOST_ONE = 1e-37, 1 - 2.0**-24

# What a prior's trial weighs where bins are pooled: a node that is all prior gives way to one that has seen events.
_PRIOR_IN_POOL = 0.01

# A slope (nats per nat) that is added to what was learnt: bins that were pooled are equal without it, and a top-k
# orders equal probabilities as it likes.
_TILT = 1e-3

_TRIALS, _SUCCESSES, _PREDICTED = range(3)


def class_of(temperature: float, coupled: bool, certain: bool, backup: bool) -> int:
    """The class of a row, 0 .. NUM_CLASSES - 1.

    `coupled`: its drafts were drawn with the noise that the target draws with (which q they had does not matter then);
    else `certain`: verified as if q were one-hot; else they were sampled from a q that the verifier knows. A greedy
    target looks at no q: its rows are certain whatever is said. `backup`: the drafts did not come from the cache.

    Raises ValueError for a temperature that is negative or not a number.
    """
    if not temperature >= 0:
        raise ValueError(f"a temperature cannot be {temperature}")
    warmth = bisect_right(_TEMPERATURE_EDGES, temperature)
    rule = 0 if warmth == 0 else 2 if coupled else 0 if certain else 1
    return (warmth * len(RULES) + rule) * len(ORIGINS) + backup


def class_name(cls: int) -> str:
    """The class in words, such as "greedy, certain, cache"."""
    rest, origin = divmod(cls, len(ORIGINS))
    warmth, rule = divmod(rest, len(RULES))
    return f"{TEMPERATURES[warmth]}, {RULES[rule]}, {ORIGINS[origin]}"


def apply(table: Tensor, classes: Tensor, what: Event, raw: Tensor) -> Tensor:
    """The probabilities [B, ...] float32 of events with the scores `raw` [B, ...] float32.

    `table` [NUM_CLASSES, 3, BINS + 1] float32 is `Calibration.table()`, on the device of the others; `classes` [B]
    int64 has each row's class. Nothing waits for the device and every shape depends on those of the arguments. A score
    that is NaN gives NaN; one of 0 still gives LOWEST, so impossible candidates are the caller's to mask.
    """
    nodes = table[:, what].index_select(0, classes)
    return _along(nodes, raw.reshape(nodes.shape[0], math.prod(raw.shape[1:])), _TAIL[what]).view_as(raw)


def apply_to_candidates(table: Tensor, classes: Tensor, rejected: Tensor, raw: Tensor) -> Tensor:
    """The same for the candidates of all positions at once: scores `raw` [B, P, M], of which kind by `rejected` [B, P].

    True is `Event.RESIDUAL`, False `Event.BONUS`.
    """
    kind = torch.where(rejected, int(Event.RESIDUAL), int(Event.BONUS))
    nodes = table[classes.unsqueeze(1), kind].flatten(0, 1)
    return _along(nodes, raw.flatten(0, 1), _TAIL[Event.BONUS]).view_as(raw)


def coverage(table: Tensor, classes: Tensor, rejected: Tensor) -> Tensor:
    """How likely the bonus token is one of the candidates of each position, [B, P] float32; the rest as above."""
    kind = torch.where(rejected, int(Event.RESIDUAL), int(Event.BONUS))
    return table[classes.unsqueeze(1), kind, BINS]


def between(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes that scores `raw` [...] float32 lie between: `left` [...] int64 and the one after it.

    And `share` [...], the weight of the second, and how far beyond the first node a score is (nats). Static.
    """
    x = raw.clamp_min(_TINY).log() - torch.log1p(-raw.clamp_max(_ALMOST_ONE))
    beyond = x - _FIRST
    at = (beyond / _WIDTH).clamp(0, BINS - 1)
    left = at.long().clamp(0, BINS - 2)  # clamped once more: NaN becomes any integer
    return left, at - left, beyond


def _along(nodes: Tensor, raw: Tensor, tail: float) -> Tensor:
    """The probabilities [R, M] of scores [R, M], each row along its own nodes, the first BINS of [R, BINS + 1]."""
    left, share, beyond = between(raw)
    value = torch.lerp(nodes.gather(1, left), nodes.gather(1, left + 1), share)
    if tail:
        value = value + tail * beyond.clamp_max(0)
    return torch.sigmoid(value).clamp(LOWEST, HIGHEST)


class Calibration:
    """The maps of all classes, and how far off they were.

    `memory` is how many trials each bin remembers: what came before fades as exp(-trials since / memory). `strength` is
    how many trials the prior counts for; where successes are rare, as many more as hold one success.

    Raises ValueError unless both are positive.
    """

    def __init__(self, memory: float = 2000.0, strength: float = 20.0) -> None:
        if memory <= 0 or strength <= 0:
            raise ValueError(f"memory ({memory}) and strength ({strength}) must be positive")
        self._memory = memory
        # [NUM_CLASSES, 3, 3, BINS]: trials, successes, and the sum of what was predicted, of each bin
        self._sums = np.zeros((NUM_CLASSES, len(Event), 3, BINS))
        prior = _prior()
        # One success at least, as far as the memory allows: 20 trials at p = 1e-4 are nothing, and after 2000
        # candidates without a success, which is likely there, the estimate would be 100 times too small.
        self._prior_trials = np.maximum(strength, np.minimum(memory, 1 / prior))
        self._prior_successes = self._prior_trials * prior
        self._log_odds = np.log(prior) - np.log1p(-prior)  # the nodes [NUM_CLASSES, 3, BINS]
        # [NUM_CLASSES, 3, 2]: rounds in which a candidate was the bonus token, and all of them
        self._covered = strength * np.stack((_prior_coverage(), np.ones((NUM_CLASSES, len(Event)))), axis=-1)
        self._stale: set[tuple[int, Event]] = set()
        self._table: Tensor | None = None

    def table(self) -> Tensor:
        """[NUM_CLASSES, 3, BINS + 1] float32, on the CPU: the nodes of all maps (log-odds), then the coverage.

        Only maps that learnt something since the last call are made anew. A table that was given out never changes.
        """
        for cls, what in tuple(self._stale):
            self._nodes(cls, what)
        if self._table is None:
            covered = self._covered[..., :1] / self._covered[..., 1:]
            self._table = torch.from_numpy(np.concatenate((self._log_odds, covered), axis=-1).astype(np.float32))
        return self._table

    def learn(self, cls: int, what: Event, raw: NDArray[np.floating], happened: NDArray[np.bool_]) -> None:
        """Learn that of the events with scores `raw`, those marked in `happened` (of the same shape) took place.

        Of candidates all those of one position belong in one call: whether any of them was the bonus token is learnt,
        too. What the map said of them until now is scored first. Raises ValueError where the shapes differ or a score
        is not in [0, 1] (but for rounding), IndexError for a class that does not exist.
        """
        if raw.shape != happened.shape:
            raise ValueError(f"{raw.shape} scores, but {happened.shape} events")
        if not 0 <= cls < NUM_CLASSES:
            raise IndexError(f"there is no class {cls}")
        if not raw.size:
            return
        if not (raw.min() >= -1e-3 and raw.max() <= 1 + 1e-3):  # false for NaN
            raise ValueError(f"scores lie in [0, 1], not in [{raw.min()}, {raw.max()}]")

        raw = raw.ravel().astype(np.float64)
        beyond = np.log(np.maximum(raw, _TINY)) - np.log1p(-np.minimum(raw, _ALMOST_ONE)) - _FIRST
        at = np.minimum(np.maximum(beyond / _WIDTH, 0), BINS - 1)
        left = np.minimum(at.astype(np.intp), BINS - 2)
        weight = at - left
        below = _TAIL[what] * np.minimum(beyond, 0)

        nodes = self._nodes(cls, what)
        predicted = 1 / (1 + np.exp(-(nodes[left] * (1 - weight) + nodes[left + 1] * weight + below)))
        predicted = np.minimum(np.maximum(predicted, LOWEST), HIGHEST)

        # In the tail p = p_0 e^(x - x_0): such an event tells as much of p_0 as e^(x - x_0) trials at the node itself.
        sums = self._sums[cls, what]
        for row, amount in ((_TRIALS, np.exp(below)), (_SUCCESSES, happened.ravel()), (_PREDICTED, predicted)):
            sums[row] += np.bincount(left, amount * (1 - weight), BINS)
            sums[row] += np.bincount(left + 1, amount * weight, BINS)
        sums *= self._memory / np.maximum(sums[_TRIALS], self._memory)
        if what is not Event.ACCEPTANCE:
            covered = self._covered[cls, what]
            covered += happened.any(), 1.0
            covered *= self._memory / max(covered[1], self._memory)
        self._stale.add((cls, what))

    def calibration_error(self, cls: int | None, what: Event) -> float:
        """The expected calibration error of what was predicted before each `learn`, of one class or of all (None).

        sum_b |predicted_b - successes_b| / sum_b trials_b over bins (and classes), as far as the memory reaches. NaN
        where nothing was learnt. A perfect map has the noise of its bins, about 1 % after 2000 events.
        """
        sums = self._sums[:, what] if cls is None else self._sums[cls : cls + 1, what]
        trials = sums[:, _TRIALS].sum()
        if not trials:
            return math.nan
        return float(np.abs(sums[:, _PREDICTED] - sums[:, _SUCCESSES]).sum() / trials)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """For logs: of every class and kind of event that learnt something, by name, what is remembered.

        `trials`, `rate` (successes per trial) and `error` (`calibration_error`).
        """
        summary: dict[str, dict[str, dict[str, float]]] = {}
        for cls in range(NUM_CLASSES):
            for what in Event:
                trials, successes, _ = self._sums[cls, what].sum(axis=-1).tolist()
                if trials:
                    summary.setdefault(class_name(cls), {})[what.name.lower()] = {
                        "trials": trials,
                        "rate": successes / trials,
                        "error": self.calibration_error(cls, what),
                    }
        return summary

    def _nodes(self, cls: int, what: Event) -> Floats:
        """The nodes [BINS] of one map, up to date."""
        nodes = self._log_odds[cls, what]
        if (cls, what) in self._stale:
            trials, successes, _ = self._sums[cls, what]
            prior_trials = self._prior_trials[cls, what]
            p = (successes + self._prior_successes[cls, what]) / (trials + prior_trials)
            p = np.minimum(p, HIGHEST)  # in the tail successes may outnumber the trials, which are fractions there
            if (p[1:] < p[:-1]).any():
                p = _isotonic(p, trials + _PRIOR_IN_POOL * prior_trials)
            nodes[:] = np.log(p) - np.log1p(-p) + _TILT * _CENTRES
            self._stale.remove((cls, what))
            self._table = None
        return nodes


def _prior() -> Floats:
    """sigmoid(slope x + offset) at the bins' centres, [NUM_CLASSES, 3, BINS]."""
    greedy_first = [["greedy"] * len(RULES)] + [list(RULES)] * (len(TEMPERATURES) - 1)
    names = [name for row in greedy_first for name in row for _ in ORIGINS]
    lines = np.array([[PRIOR_LINES[what][name] for what in Event] for name in names])
    return 1 / (1 + np.exp(-(lines[..., :1] * _CENTRES + lines[..., 1:])))


def _prior_coverage() -> Floats:
    """[NUM_CLASSES, 3]; there is nothing to cover for the acceptance of a draft."""
    shares: Floats = np.ones((NUM_CLASSES, len(Event)))
    for cls in range(NUM_CLASSES):
        warmth, rule = divmod(cls // len(ORIGINS), len(RULES))
        for what, by_name in PRIOR_COVERAGE.items():
            shares[cls, what] = by_name["greedy" if warmth == 0 else RULES[rule]]
    return shares


def _isotonic(mean: Floats, weight: Floats) -> Floats:
    """The non-decreasing sequence that is nearest to `mean` [n] in weighted squares, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for m, w in zip(mean.tolist(), weight.tolist(), strict=True):
        length = 1
        while pools and pools[-1][0] >= m:
            before_m, before_w, before_length = pools.pop()
            m = (before_m * before_w + m * w) / (before_w + w)
            w += before_w
            length += before_length
        pools.append((m, w, length))
    return np.repeat([m for m, _, _ in pools], [length for _, _, length in pools])
