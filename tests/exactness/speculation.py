"""The draft side for many independent requests at once: a speculation cache each, by the project's own functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.exactness.models import PROMPT, VOCABULARY, Settings, contexts, draft_logits
from vllm_saguaro.algorithm import outcomes
from vllm_saguaro.algorithm.calibration import Calibration, class_of
from vllm_saguaro.algorithm.noise import KeySeeds, NoiseSeeds, gumbel_of_all
from vllm_saguaro.algorithm.outcomes import Beliefs, Outcomes
from vllm_saguaro.algorithm.sampling import Candidates, SamplingRows, candidates, deflate, top
from vllm_saguaro.drafting.drawing import Drawer
from vllm_saguaro.drafting.forecast import NOISE_SHARPNESS
from vllm_saguaro.drafting.trunk import Deflation, Drawing, DrawRule
from vllm_saguaro.messages import Noise

K = 2
"""Drafts of a speculation."""


class Source(IntEnum):
    """Where the drafts of a row came from."""

    NONE = 0
    HIT = 1
    NGRAM = 2
    JIT = 3


@dataclass(frozen=True)
class Kind:
    """How drafts are drawn, and verified."""

    drawing: Drawing
    c: float = 1.0
    noise: Noise = Noise.UNKNOWN
    samples: int = 100_000


KINDS: dict[str, Kind] = {
    "certain": Kind(Drawing.CERTAIN),
    "sampled": Kind(Drawing.SAMPLED),
    "sampled, C=0.3": Kind(Drawing.SAMPLED, c=0.3),
    "coupled by key": Kind(Drawing.COUPLED, noise=Noise.KEY),
    # Each request has two generators of its own, which is slow.
    "coupled by seed": Kind(Drawing.COUPLED, noise=Noise.SEED, samples=20_000),
}


@dataclass
class Speculation:
    """What rows have under verification.

    tokens [R, K] int64, of which the first `count` [R] are real. q_tokens, q [R, K, M]: what they were drawn from,
    where `told` [R]; the others are certain. source [R].
    """

    tokens: Tensor
    count: Tensor
    q_tokens: Tensor
    q: Tensor
    told: Tensor
    source: Tensor

    @classmethod
    def none(cls, rows: int, candidates: int) -> Speculation:
        """No drafts."""
        zeros = torch.zeros(rows, dtype=torch.int64)
        tokens = torch.zeros(rows, K, dtype=torch.int64)
        q_tokens = torch.zeros(rows, K, candidates, dtype=torch.int64)
        q = torch.zeros(rows, K, candidates)
        return cls(tokens, zeros, q_tokens, q, torch.zeros(rows, dtype=torch.bool), zeros.clone())

    def take(self, index: Tensor) -> Speculation:
        """Some rows (indices or a mask)."""
        return Speculation(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def put(self, mask: Tensor, other: Speculation) -> None:
        """Replace the rows of `mask` by all those of `other`."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[mask] = getattr(other, name)


@dataclass
class Cache:
    """The tables of R rows: N outcomes each, and the drafts [R, N, K] after each, with their q [R, N, K, M]."""

    outcomes: Outcomes
    drafts: Tensor
    q_tokens: Tensor
    q: Tensor

    def find(self, accepted: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the outcome of each row is there, and its branch."""
        match = (self.outcomes.accepted == accepted[:, None]) & (self.outcomes.bonus == bonus[:, None])
        return match.any(1), match.long().argmax(1)


@cache
def noise_integers(noise: Noise, rows: int, seed: int) -> tuple[list[int], Tensor]:
    """The seeds or keys of `rows` requests, and the integers [rows, 12] that the draft side makes of them."""
    rng = np.random.default_rng(seed)
    if noise is Noise.KEY:
        names = rng.integers(-(2**63), 2**63, rows).tolist()
        kind: Any = KeySeeds
    else:
        names = rng.choice(1 << 40, rows, replace=False).tolist()
        kind = NoiseSeeds
    sources = [kind(name) for name in names]
    return names, torch.tensor([[source.at(index) for index in range(12)] for source in sources])


class _Racing:
    """As much of a `DraftModel` as drawing needs."""

    device = torch.device("cpu")

    def race(self, logits: Tensor, seeds: Tensor) -> Tensor:
        return torch.ops._C.fused_gumbel_argmax(logits, seeds)


class DraftSide:
    """Predicts outcomes, and drafts for each of them before the real one is known."""

    FAN_OUT = (2, 1)
    """F of each position, for the deflation."""

    def __init__(self, kind: Kind, settings: Settings, branches: int, integers: Tensor | None, seed: int) -> None:
        """`integers` [requests, 12]: the noise of every request's tokens, where it is known. `seed` of the draws."""
        self.kind, self.branches = kind, branches
        self._integers = integers
        self._samplings = [setting.sampling(kind.noise) for setting in settings]
        self._rows = SamplingRows.of(self._samplings, "cpu")
        method = "greedy" if kind.drawing is Drawing.CERTAIN else "probabilistic"
        self._drawer = Drawer(method, _Racing(), seed)  # type: ignore[arg-type]
        drawings = [self._drawer.kind(sampling) for sampling in self._samplings]
        assert set(drawings) <= {kind.drawing, Drawing.CERTAIN}
        self._drawings = torch.tensor(drawings)
        self._occur = frozenset(drawings)
        self._calibration = Calibration().table()

    def table(self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation) -> Cache:
        """The N likeliest outcomes of the verification of `under`, and drafts for each.

        ids [R]: which requests; text [R, L] of `length` [R] tokens.
        """
        pairs = contexts(text, length, under.tokens)
        logits = draft_logits()[pairs[..., 0], pairs[..., 1]]
        beliefs = self._beliefs(ids, length, logits, under)
        found = outcomes.choose("ranked", beliefs, outcomes.scores(beliefs), self._calibration, self.branches)
        rows, branches = found.accepted.shape
        last = pairs[..., 1].gather(1, found.accepted)
        index = torch.arange(rows).repeat_interleave(branches)
        drafts, q_tokens, q = self.grow(
            ids[index], (length[:, None] + found.accepted).flatten(), last.flatten(), found.bonus.flatten().clamp_min(0)
        )
        shape = (rows, branches)
        return Cache(found, drafts.unflatten(0, shape), q_tokens.unflatten(0, shape), q.unflatten(0, shape))

    def grow(self, ids: Tensor, position: Tensor, before: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K drafts [B, K] after the bonus token of each branch, which is at `position` and follows the token `before`.

        And what they were drawn from: tokens and q [B, K, M].
        """
        rule = self._rule(ids, position)
        drafts: list[Tensor] = []
        found: list[Candidates] = []
        for depth in range(K):
            logits = draft_logits()[before, bonus]
            tokens, q = self.draw(logits, rule, depth)
            before, bonus = bonus, tokens
            drafts.append(tokens)
            found.append(q)
        return (
            torch.stack(drafts, 1),
            torch.stack([each.tokens for each in found], 1),
            torch.stack([each.q for each in found], 1),
        )

    def draw(self, logits: Tensor, rule: DrawRule, depth: int) -> tuple[Tensor, Candidates]:
        """The next draft of each branch [B] and what the verifier is told of its q (nothing where it has none)."""
        tokens, q = self._drawer.draw(logits, rule, depth)
        if q is None:
            q = Candidates(torch.zeros(len(tokens), 1, dtype=torch.int64), torch.zeros(len(tokens), 1))
        return torch.from_numpy(tokens), q

    def speculation(
        self, ids: Tensor, drafts: Tensor, q_tokens: Tensor, q: Tensor, count: Tensor, source: Source
    ) -> Speculation:
        """The first `count` drafts [R] of one branch a row, to be verified."""
        told = self._drawings[self._own(ids)] == Drawing.SAMPLED
        return Speculation(drafts, count, q_tokens, q, told, torch.where(count > 0, source, Source.NONE))

    def _rule(self, ids: Tensor, position: Tensor) -> DrawRule:
        """What `Drawer.rule` makes of rows that all sample alike."""
        own = self._own(ids)
        kind = self._drawings[own]
        noise = None
        if self._integers is not None:
            first = position - len(PROMPT) + 1
            noise = self._integers[ids].gather(1, first[:, None] + torch.arange(K))
        drawn = Drawing.SAMPLED in self._occur or any(s.cut for s in self._samplings if s.coupled)
        return DrawRule(
            kinds=self._occur,
            kind=kind,
            temperature=self._rows.temperature[own],
            noise=noise,
            rows=self._rows.take(own) if drawn else None,
            fan_out=torch.tensor([self.FAN_OUT]).expand(len(ids), -1),
            c=self._c(kind),
            deflation=Deflation(self.FAN_OUT, self.kind.c),
        )

    def _c(self, drawings: Tensor) -> Tensor:
        return torch.where(drawings == Drawing.SAMPLED, self.kind.c, 1.0)

    def _own(self, ids: Tensor) -> Tensor:
        """The number of each request's setting."""
        return ids % len(self._samplings)

    def _beliefs(self, ids: Tensor, length: Tensor, logits: Tensor, under: Speculation) -> Beliefs:
        """As `Forecaster` has them, from the logits [R, K + 1, V] after each draft."""
        rows, positions, _ = logits.shape
        shape = (rows, positions)
        own = self._own(ids)
        each = own.repeat_interleave(positions)
        sampling_rows = self._rows.take(each)
        found = candidates(logits.flatten(0, 1), sampling_rows)
        if self._integers is not None:
            index = (length - len(PROMPT))[:, None] + torch.arange(positions)
            noise = gumbel_of_all(self._integers[ids].gather(1, index).flatten(), VOCABULARY).float()
            value, tokens = top(logits.flatten(0, 1) / sampling_rows.temperature[:, None] + noise, found.q.shape[-1])
            coupled = (self._drawings[each] == Drawing.COUPLED)[:, None]
            share = torch.where(coupled, (NOISE_SHARPNESS * value).softmax(-1), found.q)
            found = Candidates(torch.where(coupled, tokens, found.tokens), share)
        fan_out = torch.tensor([*self.FAN_OUT, 0]).repeat(rows)
        drawn = deflate(found.q, fan_out, self._c(self._drawings[each]))
        classes = [
            class_of(s.temperature, s.coupled, self._drawer.kind(s) is Drawing.CERTAIN, False) for s in self._samplings
        ]
        return Beliefs(
            found.tokens.unflatten(0, shape),
            found.q.unflatten(0, shape),
            drawn.unflatten(0, shape),
            under.tokens,
            under.count,
            torch.tensor(classes)[own],
        )
