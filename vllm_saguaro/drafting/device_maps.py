"""How likely a draft is accepted, learnt on the device from outcomes that the host never sees.

The same maps as `algorithm/calibration.py`, for acceptance alone: nodes over the log-odds of the draft's own
probability, each the mean of a prior and of the events around it, made monotone. Every operation is static and waits
for nothing, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_saguaro.algorithm.calibration import BINS, HIGHEST, NUM_CLASSES, Calibration, Event, apply, between

# As in `Calibration`: what a prior's trial weighs where bins are pooled, and a slope that keeps an order among them.
_PRIOR_IN_POOL = 0.01
_TILT = 1e-3
_SPAN = 9.0


class AcceptanceMaps:
    """The maps of all classes. `memory` and `strength` are those of `Calibration`. Shapes: B rows, K drafts."""

    def __init__(self, device: torch.device, memory: float = 2000.0, strength: float = 20.0) -> None:
        self._memory = memory
        # [NUM_CLASSES, 3, BINS]: the share of the candidates, which the host learns, is not looked at here
        self._table = Calibration(memory, strength).table()[..., :BINS].to(device, copy=True)
        prior = torch.sigmoid(self._table[:, Event.ACCEPTANCE].double())
        self._prior_trials = (1 / prior).clamp(strength, max(memory, strength))
        self._prior_successes = self._prior_trials * prior
        self._trials = torch.zeros(NUM_CLASSES * BINS, dtype=torch.float64, device=device)
        self._successes = torch.zeros_like(self._trials)
        bins = torch.arange(BINS, device=device)
        self._tilt = _TILT * (2 * _SPAN / BINS) * (bins.double() + 0.5 - BINS / 2)
        self._beyond = bins.unsqueeze(1) > bins.unsqueeze(0)  # [j, i]: j > i

    @property
    def resident_bytes(self) -> int:
        """What the maps take on the device."""
        tensors = (self._table, self._prior_trials, self._prior_successes, self._trials, self._successes, self._beyond)
        return sum(tensor.nbytes for tensor in tensors)

    def probability(self, classes: Tensor, raw: Tensor) -> Tensor:
        """How likely drafts with the scores `raw` [B, K] float32 are accepted: [B, K] float32. classes [B] int64."""
        return apply(self._table, classes, Event.ACCEPTANCE, raw)

    def learn(self, classes: Tensor, raw: Tensor, happened: Tensor, counts: Tensor) -> None:
        """Learn that drafts with the scores `raw` [B, K] were accepted where `happened` [B, K] bool says so.

        Only of those that are marked in `counts` [B, K] bool. classes [B] int64.
        """
        left, share, _ = between(raw)
        at = (classes.unsqueeze(-1) * BINS + left).flatten()
        weight, second = counts.double().flatten(), share.double().flatten()
        taken = weight * happened.flatten()
        for sums, amount in ((self._trials, weight), (self._successes, taken)):
            sums.index_add_(0, at, amount * (1 - second))
            sums.index_add_(0, at + 1, amount * second)
        fade = self._memory / self._trials.clamp_min(self._memory)
        self._successes.mul_(fade)
        self._trials.mul_(fade)
        trials, successes = (sums.view(NUM_CLASSES, BINS) for sums in (self._trials, self._successes))
        mean = (successes + self._prior_successes) / (trials + self._prior_trials)
        mean = self._monotone(mean.clamp_max(HIGHEST), trials + _PRIOR_IN_POOL * self._prior_trials)
        self._table[:, Event.ACCEPTANCE] = (mean.log() - torch.log1p(-mean) + self._tilt).float()

    def _monotone(self, mean: Tensor, weight: Tensor) -> Tensor:
        """The non-decreasing rows nearest to `mean` [C, BINS] in weighted squares.

        By the formula max over j <= i of min over k >= i of the mean of j .. k: no loop that depends on the values.
        """
        before = torch.nn.functional.pad(weight.cumsum(-1), (1, 0))
        total = torch.nn.functional.pad((weight * mean).cumsum(-1), (1, 0))
        span = before[:, None, 1:] - before[:, :-1, None]  # [C, j, k]
        means = (total[:, None, 1:] - total[:, :-1, None]) / span
        means = means.masked_fill(self._beyond, torch.inf)
        lowest = means.flip(-1).cummin(-1).values.flip(-1)  # [C, j, i]: over k >= i
        return lowest.masked_fill(self._beyond, -torch.inf).amax(1)
