"""What the cells of `test_cells.py` are able to see: each error here is planted, and some p value falls to nothing.

Beside each error stands the cell (kind of draft, path, setting) that catches it, and how many samples that takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.v1.sample import rejection_sampler as vllms

from tests.exactness.judgement import PLANTED_P, SMALLEST_P, p_values
from tests.exactness.models import PROMPT, SETTINGS, VOCABULARY, contexts, target_logits
from tests.exactness.rounds import PATHS, simulate
from tests.exactness.speculation import KINDS, Cache, DraftSide, K, Source, Speculation
from tests.exactness.verification import TargetSide
from vllm_saguaro.algorithm.sampling import Candidates, candidates
from vllm_saguaro.drafting.trunk import Drawing, DrawRule

# ---- a q that was not drawn from ------------------------------------------------------------------------------------


class MovedQ(DraftSide):
    """The verifier is told a q with 1 % of the mass moved from the likeliest candidate to the second."""

    def draw(self, logits: Tensor, rule: DrawRule, depth: int) -> tuple[Tensor, Candidates]:
        tokens, found = super().draw(logits, rule, depth)
        q = found.q.clone()
        q[:, :2] += torch.tensor([-0.01, 0.01])
        return tokens, Candidates(found.tokens, q)


class UndeflatedQ(DraftSide):
    """Drafts are drawn from sigma_{F,C}(q), and the verifier is told q."""

    def draw(self, logits: Tensor, rule: DrawRule, depth: int) -> tuple[Tensor, Candidates]:
        tokens, found = super().draw(logits, rule, depth)
        assert rule.rows is not None
        return tokens, Candidates(found.tokens, candidates(logits, rule.rows).q)


class LikeliestWithQ(DraftSide):
    """The likeliest token is drafted, and the verifier is told q as if it had been drawn."""

    def draw(self, logits: Tensor, rule: DrawRule, depth: int) -> tuple[Tensor, Candidates]:
        _, found = super().draw(logits, rule, depth)
        return found.tokens[:, 0], found


class _Remembering(DraftSide):
    """Keeps the table before the newest of every request."""

    _kept: tuple[Tensor, Tensor, Tensor] | None = None

    def before(self, ids: Tensor, now: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts, q_tokens and q of each request's table of the round before (the first time: of this one)."""
        newest = (now.drafts, now.q_tokens, now.q)
        if self._kept is None:
            self._kept = (now.drafts.clone(), now.q_tokens.clone(), now.q.clone())
        drafts, q_tokens, q = (each[ids] for each in self._kept)
        for memory, values in zip(self._kept, newest, strict=True):
            memory[ids] = values
        return drafts, q_tokens, q


class StaleQ(_Remembering):
    """The verifier is told the q of the same branch in the table of the round before."""

    def table(self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation) -> Cache:
        now = super().table(ids, text, length, under)
        _, q_tokens, q = self.before(ids, now)
        return Cache(now.outcomes, now.drafts, q_tokens, q)


class DraftsTwice(_Remembering):
    """The drafts of the table before, with the q that they were drawn from.

    Some of them have been verified already: what was accepted is text now, so that they are no draw from q any more.
    """

    def table(self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation) -> Cache:
        now = super().table(ids, text, length, under)
        return Cache(now.outcomes, *self.before(ids, now))


class DraftsOfAnother(DraftSide):
    """The drafts of another request's table, with the q that they were drawn from: bad drafts, but no error."""

    def table(self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation) -> Cache:
        now = super().table(ids, text, length, under)
        return Cache(now.outcomes, now.drafts.roll(1, 0), now.q_tokens.roll(1, 0), now.q.roll(1, 0))


class NextDraftsQ(TargetSide):
    """The q of a row's drafts are one place off."""

    def told_q(self, under: Speculation) -> Tensor | None:
        q_tokens, q = under.q_tokens.roll(1, dims=1), under.q.roll(1, dims=1)
        return super().told_q(Speculation(under.tokens, under.count, q_tokens, q, under.told, under.source))


class NgramWithQ(TargetSide):
    """The guesses from the text are verified with a q, although none was drawn from it."""

    def told_q(self, under: Speculation) -> Tensor | None:
        guessed = under.source == Source.NGRAM
        q_tokens, q = under.q_tokens.clone(), under.q.clone()
        q_tokens[guessed] = torch.arange(VOCABULARY)
        q[guessed] = 1 / VOCABULARY
        return super().told_q(Speculation(under.tokens, under.count, q_tokens, q, under.told | guessed, under.source))


# ---- a verifier that decides otherwise ------------------------------------------------------------------------------


class LikeliestAfterMiss(TargetSide):
    """A row whose outcome was not predicted takes the target's likeliest token, whatever its noise."""

    def verify(
        self, ids: Tensor, text: Tensor, length: Tensor, under: Speculation, restarted: Tensor | None = None
    ) -> Tensor:
        found = super().verify(ids, text, length, under, restarted)
        pairs = contexts(text, length, under.tokens)[:, 0]
        missed = (under.count == 0) & (length > len(PROMPT))
        found[missed, 0] = target_logits()[pairs[missed, 0], pairs[missed, 1]].argmax(-1)
        return found


class LikeliestIsAccepted(TargetSide):
    """A draft from the cache that is the target's likeliest token is accepted with certainty."""

    SOURCE = Source.HIT

    def verify(self, *others: Any) -> Tensor:
        original = vllms.generate_uniform_probs
        under = others[3]
        pairs = contexts(others[1], others[2], under.tokens)[:, :-1]
        best = target_logits()[pairs[..., 0], pairs[..., 1]].argmax(-1) == under.tokens
        certain = (best & (under.source == self.SOURCE)[:, None])[torch.arange(K) < under.count[:, None]]

        def coins(*args: Any) -> Tensor:
            return original(*args).masked_fill(certain, 0.0)

        with mock.patch.object(vllms, "generate_uniform_probs", coins):
            return super().verify(*others)


class LikeliestGuessIsAccepted(LikeliestIsAccepted):
    """The same for a guess from the text."""

    SOURCE = Source.NGRAM


class LikeliestJustInTimeIsAccepted(LikeliestIsAccepted):
    """The same for a draft that was made after the outcome was known."""

    SOURCE = Source.JIT


class WrongTokenExcluded(TargetSide):
    """After a rejection the residual lacks another token than the draft."""

    def verify(self, *others: Any) -> Tensor:
        original = vllms.sample_recovered_tokens

        def recover(most: int, counts: list[int], ends: Tensor, drafts: Tensor, *rest: Any) -> Tensor:
            return original(most, counts, ends, (drafts + 1) % VOCABULARY, *rest)

        with mock.patch.object(vllms, "sample_recovered_tokens", recover):
            return super().verify(*others)


class NothingExcluded(TargetSide):
    """After a rejection the token is drawn from p once more."""

    def verify(self, *others: Any) -> Tensor:
        original = vllms.sample_recovered_tokens

        def recover(most: int, counts: list[int], ends: Tensor, drafts: Tensor, q: Any, *rest: Any) -> Tensor:
            return original(most, counts, ends, drafts, torch.zeros(len(drafts), VOCABULARY), *rest)

        with mock.patch.object(vllms, "sample_recovered_tokens", recover):
            return super().verify(*others)


# ---- randomness that is not independent -----------------------------------------------------------------------------


def stream(ids: Tensor, position: Tensor) -> Tensor:
    """A uniform number [R] float64 for each request and text position: what two sides with one seed would both draw."""
    generator = torch.Generator().manual_seed(77)
    numbers = torch.rand(1 << 17, 16, generator=generator, dtype=torch.float64)
    return numbers[ids, position]


class DrawsFromTheStream(DraftSide):
    """Drafts are drawn by inversion, with the number that the stream has for their text position."""

    def grow(self, ids: Tensor, position: Tensor, before: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._numbers = torch.stack([stream(ids, position + 1 + depth) for depth in range(K)], 1)
        return super().grow(ids, position, before, bonus)

    def draw(self, logits: Tensor, rule: DrawRule, depth: int) -> tuple[Tensor, Candidates]:
        _, found = super().draw(logits, rule, depth)
        below = found.q.double().cumsum(-1) <= self._numbers[:, depth, None]
        index = below.sum(-1).clamp_max(found.q.shape[-1] - 1)
        return found.tokens.gather(1, index[:, None]).squeeze(1), found


class CoinsFromTheStream(TargetSide):
    """The verifier's coins are the numbers of the same stream."""

    def verify(self, *others: Any) -> Tensor:
        ids, _, length, under = others[:4]
        real = torch.arange(K) < under.count[:, None]
        coins = torch.stack([stream(ids, length + j) for j in range(K)], 1)[real]
        with mock.patch.object(vllms, "generate_uniform_probs", return_value=coins):
            return super().verify(*others)


class NoiseTwice(TargetSide):
    """Output tokens 1 and 2 are decided by the same integer."""

    def noise_index(self, length: Tensor, restarted: Tensor | None) -> Tensor:
        return (super().noise_index(length, restarted) - 1).clamp_min(0)


class NoiseShiftedByRestart(TargetSide):
    """A request that was put off goes on one number too low."""

    def noise_index(self, length: Tensor, restarted: Tensor | None) -> Tensor:
        assert restarted is not None
        return super().noise_index(length, restarted) - restarted.long()


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """An error, and the cell that it is looked for in."""

    kind: str
    path: str
    draft: type[DraftSide] = DraftSide
    target: type[TargetSide] = TargetSide
    samples: int = 20_000
    setting: str = "T=1"


PLANTED: dict[str, Plant] = {
    "q off by 1 %": Plant("sampled", "hit", draft=MovedQ, samples=200_000, setting="T=0.7"),
    "q told without the deflation": Plant("sampled, C=0.3", "hit", draft=UndeflatedQ),
    "the likeliest token drafted, q told": Plant("sampled", "hit", draft=LikeliestWithQ),
    "q of the table before": Plant("sampled", "hit", draft=StaleQ),
    "drafts of the table before, with their own q": Plant("sampled", "hit", draft=DraftsTwice, samples=50_000),
    "q of the next draft": Plant("sampled", "fewer taken", target=NextDraftsQ),
    "q told for an n-gram guess": Plant("sampled", "n-gram", target=NgramWithQ),
    "the likeliest token after a miss": Plant("certain", "miss", target=LikeliestAfterMiss),
    "the likeliest token after a miss, coupled": Plant("coupled by key", "miss", target=LikeliestAfterMiss),
    "the target's likeliest token always accepted": Plant("certain", "hit", target=LikeliestIsAccepted),
    "its likeliest token always accepted, n-gram": Plant("certain", "n-gram", target=LikeliestGuessIsAccepted),
    "its likeliest token always accepted, just in time": Plant(
        "sampled", "just in time", target=LikeliestJustInTimeIsAccepted
    ),
    "another token than the draft excluded": Plant("certain", "hit", target=WrongTokenExcluded),
    "a rejected draft drawn again": Plant("sampled", "hit", target=NothingExcluded),
    "one random stream for both sides": Plant("sampled", "hit", DrawsFromTheStream, CoinsFromTheStream),
    "one number of the noise for two tokens": Plant("coupled by key", "hit", target=NoiseTwice),
    "the noise shifted by a restart": Plant("coupled by key", "restart", target=NoiseShiftedByRestart),
}

RIGHT: dict[str, Plant] = {
    "drafts of another prefix, with their own q": Plant("sampled", "hit", draft=DraftsOfAnother, samples=50_000),
    "drafts drawn from a stream that the verifier does not have": Plant(
        "sampled", "hit", draft=DrawsFromTheStream, samples=50_000
    ),
    "coins from a stream that the draft does not have": Plant(
        "sampled", "hit", target=CoinsFromTheStream, samples=50_000
    ),
}


def judged(plant: Plant) -> dict[str, float]:
    kind, setting = KINDS[plant.kind], SETTINGS[plant.setting]
    samples = simulate(
        kind, PATHS[plant.path], (setting,), plant.samples, seed=5, draft=plant.draft, target=plant.target
    )
    return p_values(samples, setting, kind.drawing is not Drawing.COUPLED)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(name: str) -> None:
    found = judged(PLANTED[name])
    assert min(found.values()) < PLANTED_P, found


@pytest.mark.parametrize("name", RIGHT)
def test_what_only_looks_wrong_is_exact(name: str) -> None:
    found = judged(RIGHT[name])
    assert min(found.values()) > SMALLEST_P, found
