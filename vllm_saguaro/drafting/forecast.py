"""What the draft engine believes of the outcomes to come, and what it learns when they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_saguaro.algorithm import noise, outcomes, position_noise
from vllm_saguaro.algorithm.calibration import Calibration, Event, class_of
from vllm_saguaro.algorithm.outcomes import Beliefs
from vllm_saguaro.algorithm.sampling import SUPPORT, SamplingRows, candidates, deflate, top
from vllm_saguaro.messages import Sampling

if TYPE_CHECKING:
    from vllm_saguaro.drafting.trunk import Trunk

# How much the noise that is known sharpens the belief: share ~ (q e^g)^gamma.
NOISE_SHARPNESS = 1.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was predicted for one request and round.

    accept [n], tokens [n + 1, M], scores [n + 1, M]: raw scores, as `outcomes.scores` has them. `ranked`: the outcomes
    (k, t*), likeliest first; the first `wanted` of them were to get a branch.
    """

    cls: int
    accept: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    ranked: list[tuple[int, int]]
    wanted: int


class Forecaster:
    """Predicts outcomes from the draft model's logits, by maps that learn from every outcome."""

    def __init__(self, fan_out: str) -> None:
        """`fan_out`: one of `outcomes.FanOut`."""
        self.fan_out = fan_out
        self.calibration = Calibration()
        self._untaught = Calibration().table()

    def predict(
        self, trunks: Sequence[Trunk], logits: torch.Tensor, branches: int, certain: Sequence[bool], wanted: int
    ) -> list[list[tuple[int, int]]]:
        """The `branches` likeliest outcomes (k, t*) of each trunk, likeliest first.

        `logits` [T, V]: of the last committed token and of each draft under verification, trunk after trunk.
        `certain`: whether a trunk's drafts have no q. `wanted`: how many outcomes get a branch. Leaves in each trunk
        what there is to learn from.
        """
        beliefs = self._beliefs(trunks, logits, certain)
        raw = outcomes.scores(beliefs)
        table = self._untaught if self.fan_out == "uncalibrated" else self.calibration.table()
        found = outcomes.choose(self.fan_out, beliefs, raw, table.to(logits.device), branches)
        if self.fan_out not in ("ranked", "uncalibrated"):  # those are in order already
            order = found.probability.argsort(dim=1, descending=True, stable=True)
            found = outcomes.Outcomes(*(x.gather(1, order) for x in (found.accepted, found.bonus, found.probability)))
        accepted, bonus = found.accepted.tolist(), found.bonus.tolist()
        accept, tokens, scores = (x.cpu().numpy() for x in (raw.accept, beliefs.tokens, raw.token))
        classes = beliefs.classes.tolist()
        ranked = [
            # Where fewer outcomes are possible than asked for, the rest is marked and has no token.
            [(k, token) for k, token in zip(*pair, strict=True) if token != outcomes.NO_TOKEN]
            for pair in zip(accepted, bonus, strict=True)
        ]
        for row, trunk in enumerate(trunks):
            n = len(trunk.speculation)
            trunk.forecast = Forecast(
                classes[row], accept[row, :n], tokens[row, : n + 1], scores[row, : n + 1], ranked[row], wanted
            )
        return ranked

    def learn(self, forecast: Forecast, accepted: int, bonus: int, verified: int) -> int | None:
        """Take in the real outcome of a forecast; its rank among the predicted ones (from 0), None if it was not there.

        `verified` of the drafts were in the pass at all: nothing is learnt of the others.
        """
        n = len(forecast.accept)
        judged = min(accepted + 1, verified)
        happened = np.arange(judged) < accepted
        self.calibration.learn(forecast.cls, Event.ACCEPTANCE, forecast.accept[:judged], happened)
        # Where the scheduler took fewer drafts than there were, the bonus token after the last of them is no residual.
        if accepted < verified or verified == n:
            possible = forecast.scores[accepted] > 0
            self.calibration.learn(
                forecast.cls,
                Event.RESIDUAL if accepted < verified else Event.BONUS,
                forecast.scores[accepted][possible],
                forecast.tokens[accepted][possible] == bonus,
            )
        pair = (accepted, bonus)
        return forecast.ranked.index(pair) if pair in forecast.ranked else None

    def _beliefs(self, trunks: Sequence[Trunk], logits: torch.Tensor, certain: Sequence[bool]) -> Beliefs:
        device = logits.device
        counts = [len(trunk.speculation) + 1 for trunk in trunks]
        widest = max(counts)
        repeats = torch.tensor(counts, device=device)
        tokens, share = self._shares(trunks, counts, logits)
        drawn = share
        if any(trunk.deflation.c != 1 for trunk in trunks):
            padded = [(list(t.deflation.fan_out) + [0] * widest)[:n] for t, n in zip(trunks, counts, strict=True)]
            fan_out = torch.tensor([f for each in padded for f in each], dtype=torch.int64, device=device)
            c = torch.tensor([t.deflation.c for t in trunks], dtype=torch.float32, device=device)
            drawn = deflate(share, fan_out, c.repeat_interleave(repeats))
        drafts = torch.zeros(len(trunks), widest - 1, dtype=torch.int64)
        for line, trunk in zip(drafts, trunks, strict=True):
            line[: len(trunk.speculation)] = torch.tensor(trunk.speculation, dtype=torch.int64)
        classes = [
            class_of(t.sampling.temperature, t.sampling.coupled, sure or t.backup, t.backup)
            for t, sure in zip(trunks, certain, strict=True)
        ]
        return Beliefs(
            tokens=_by_trunk(tokens, counts, widest),
            share=_by_trunk(share, counts, widest),
            drawn=_by_trunk(drawn, counts, widest),
            drafts=drafts.to(device),
            n=repeats - 1,
            classes=torch.tensor(classes, device=device),
        )

    def _shares(
        self, trunks: Sequence[Trunk], counts: Sequence[int], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The M candidates of each position [T, M], and how likely each is the target's next token.

        q of the draft; where the noise g is known, (q e^g)^gamma over the M tokens that q e^g puts first.
        """
        device = logits.device
        coupled = [trunk.sampling.coupled for trunk in trunks]
        # A cut of the target's falls elsewhere than the draft's would, so the noise is predicted without it.
        samplings = [Sampling(t.sampling.temperature) if t.sampling.coupled else t.sampling for t in trunks]
        index = torch.arange(len(trunks), device=device).repeat_interleave(torch.tensor(counts, device=device))
        rows = SamplingRows.of(samplings, device).take(index)
        if not any(coupled):
            found = candidates(logits, rows)
            return found.tokens, found.q
        seeds = [s for t, count in zip(trunks, counts, strict=True) for s in t.noise_seeds(len(t.tokens), count)]
        positional = any(t.sampling.positional for t in trunks)
        gumbel_of_all = position_noise.gumbel_of_all if positional else noise.gumbel_of_all
        known = gumbel_of_all(torch.tensor(seeds, dtype=torch.int64, device=device), logits.shape[-1])
        raced = logits / rows.temperature.unsqueeze(-1) + known.float()
        value, tokens = top(raced, min(SUPPORT, raced.shape[-1]))
        share = torch.softmax(NOISE_SHARPNESS * value, dim=-1)
        if all(coupled):
            return tokens, share
        found, noisy = candidates(logits, rows), torch.tensor(coupled, device=device)[index].unsqueeze(-1)
        return torch.where(noisy, tokens, found.tokens), torch.where(noisy, share, found.q)


def _by_trunk(flat: torch.Tensor, counts: Sequence[int], widest: int) -> torch.Tensor:
    """[T, M] -> [B, K + 1, M], padded with zeros."""
    if all(count == widest for count in counts):
        return flat.view(len(counts), widest, -1)
    padded = flat.new_zeros(len(counts), widest, flat.shape[-1])
    for row, part in zip(padded, flat.split(list(counts)), strict=True):
        row[: part.shape[0]] = part
    return padded
