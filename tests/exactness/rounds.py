"""Round after round of speculation and verification, for many requests at once: who gets which drafts, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.exactness.models import EMITTED, PROMPT, VOCABULARY, Settings
from tests.exactness.speculation import Cache, DraftSide, K, Kind, Source, Speculation, noise_integers
from tests.exactness.verification import TargetSide
from vllm_saguaro.algorithm import sampling
from vllm_saguaro.drafting.trunk import Drawing
from vllm_saguaro.messages import Noise


@dataclass(frozen=True)
class Path:
    """What happens between draft and verification. Shares of the rows, by coins of their own, each round anew."""

    branches: int = 4
    late: float = 0.0
    """Tables that are as deep as they happen to be: 0 .. K - 1 drafts."""
    ngram: float = 0.0
    """Misses that get a guess from the text."""
    jit: float = 0.0
    """Misses that get 1 .. K drafts just in time."""
    restarted: float = 0.0
    """Requests that lose their drafts before they are verified, and are learnt anew from their text."""
    cut: float = 0.0
    """Drafts of which the scheduler takes only 0 .. n - 1."""


PATHS: dict[str, Path] = {
    "hit": Path(),
    "shorter hit": Path(late=0.7),
    "miss": Path(branches=2),
    "n-gram": Path(branches=2, ngram=1.0),
    "just in time": Path(branches=2, jit=1.0),
    "restart": Path(restarted=0.4),
    "fewer taken": Path(cut=0.5),
    "all": Path(branches=3, late=0.3, ngram=0.4, jit=0.4, restarted=0.15, cut=0.2),
}


@dataclass(frozen=True)
class Samples:
    """The first tokens of R continuations, and how each came about.

    outputs [R, EMITTED]; source [R, EMITTED] of the drafts that were verified in the pass that gave the token, place
    [R, EMITTED] of the token in that pass, from 0. accepted, drafted: drafts in all passes.
    """

    outputs: np.ndarray
    source: np.ndarray
    place: np.ndarray
    accepted: int
    drafted: int

    def of(self, number: int, count: int) -> Samples:
        """Those of the requests that have setting `number` of `count`."""
        outputs, source, place = (x[number::count] for x in (self.outputs, self.source, self.place))
        return Samples(outputs, source, place, self.accepted, self.drafted)


def simulate(
    kind: Kind,
    path: Path,
    settings: Settings,
    samples: int | None = None,
    seed: int = 0,
    draft: type[DraftSide] = DraftSide,
    target: Callable[..., TargetSide] = TargetSide,
) -> Samples:
    """Let `samples` requests (None: as many as the kind has) run until each has EMITTED tokens."""
    rows = samples or kind.samples
    torch.manual_seed(seed)  # vLLM's own random numbers
    chance = torch.Generator().manual_seed(seed + 1000)  # what befalls a request: looks at no token
    names, integers = noise_integers(kind.noise, rows, seed) if kind.noise is not Noise.UNKNOWN else ([], None)
    drafting = draft(kind, settings, path.branches, integers, seed + 2000)
    verifying = target(kind, settings, names, integers)
    width = min(sampling.SUPPORT, VOCABULARY) if kind.drawing is Drawing.SAMPLED else 1

    ids = torch.arange(rows)
    text = torch.zeros(rows, len(PROMPT) + EMITTED + 2 * K + 2, dtype=torch.int64)
    text[:, : len(PROMPT)] = torch.tensor(PROMPT)
    length = torch.full((rows,), len(PROMPT))
    source, place = torch.zeros_like(text), torch.zeros_like(text)
    finished = (torch.zeros_like(text), torch.zeros_like(text), torch.zeros_like(text))
    under = Speculation.none(rows, width)
    restarted = torch.zeros(rows, dtype=torch.bool)
    accepted = drafted = 0

    def befalls(share: float) -> Tensor:
        return torch.rand(len(ids), generator=chance) < share

    while len(ids):
        lost = befalls(path.restarted) & (under.count > 0)
        restarted |= lost
        under.put(lost, Speculation.none(int(lost.sum()), width))
        # The table is drawn while the target verifies: before the outcome is known, for all drafts handed over.
        table = drafting.table(ids, text, length, under)
        fewer = (torch.rand(len(ids), generator=chance) * under.count).long()
        under.count = torch.where(befalls(path.cut), fewer, under.count)
        under.source[under.count == 0] = Source.NONE
        tokens = verifying.verify(ids, text, length, under, restarted)

        emitted = (tokens >= 0).sum(1)
        k, bonus = emitted - 1, tokens.gather(1, emitted[:, None] - 1).squeeze(1)
        accepted, drafted = accepted + int(k.sum()), drafted + int(under.count.sum())
        at = length[:, None] + torch.arange(K + 1)
        for memory, values in (
            (text, tokens),
            (source, under.source[:, None].expand_as(tokens)),
            (place, torch.arange(K + 1).expand_as(tokens)),
        ):
            memory.scatter_(1, at, torch.where(tokens >= 0, values, 0))
        before, length = length, length + emitted

        last = torch.where(k > 0, tokens.gather(1, (k - 1).clamp_min(0)[:, None]).squeeze(1), text_at(text, before - 1))
        under = _next_drafts(path, drafting, table, befalls, chance, ids, text, length, k, last, bonus)
        done = length - len(PROMPT) >= EMITTED
        for memory, values in zip(finished, (text, source, place), strict=True):
            memory[ids[done]] = values[done]
        kept = ~done
        ids, text, length, source, place = (x[kept] for x in (ids, text, length, source, place))
        under, restarted = under.take(kept), restarted[kept]

    outputs, source, place = (x[:, len(PROMPT) : len(PROMPT) + EMITTED].numpy() for x in finished)  # type: ignore[assignment]
    return Samples(outputs, source, place, accepted, drafted)  # type: ignore[arg-type]


def text_at(text: Tensor, position: Tensor) -> Tensor:
    """The token [R] at one position of each text."""
    return text.gather(1, position[:, None]).squeeze(1)


def _next_drafts(
    path: Path,
    drafting: DraftSide,
    table: Cache,
    befalls: Callable[[float], Tensor],
    chance: torch.Generator,
    ids: Tensor,
    text: Tensor,
    length: Tensor,
    accepted: Tensor,
    last: Tensor,
    bonus: Tensor,
) -> Speculation:
    """Look the outcomes up; those that are not there get what the path says."""
    rows = len(ids)
    hit, branch = table.find(accepted, bonus)
    each = torch.arange(rows)
    depth = torch.where(befalls(path.late), torch.randint(K, (rows,), generator=chance), K)
    under = drafting.speculation(
        ids,
        table.drafts[each, branch],
        table.q_tokens[each, branch],
        table.q[each, branch],
        torch.where(hit, depth, 0),
        Source.HIT,
    )
    coin = torch.rand(rows, generator=chance)
    guessed = ~hit & (coin < path.ngram)
    if guessed.any():
        under.put(guessed, _guess(text[guessed], length[guessed], under.q.shape[-1]))
    waited = ~hit & (coin >= path.ngram) & (coin < path.ngram + path.jit)
    if waited.any():
        count = torch.randint(1, K + 1, (int(waited.sum()),), generator=chance)
        drawn = drafting.grow(ids[waited], length[waited] - 1, last[waited], bonus[waited])
        under.put(waited, drafting.speculation(ids[waited], *drawn, count, Source.JIT))
    return under


def _guess(text: Tensor, length: Tensor, candidates: int) -> Speculation:
    """What followed the last token where it occurred before, nothing where it did not."""
    under = Speculation.none(len(text), candidates)
    place = torch.arange(text.shape[1])
    same = (text == text_at(text, length - 1)[:, None]) & (place < length[:, None] - 1)
    found = torch.where(same, place, -1).amax(1)
    under.tokens = text.gather(1, found[:, None] + 1 + torch.arange(K))
    under.count = torch.where(found >= 0, (length - 1 - found).clamp_max(K), 0)
    under.source = torch.where(under.count > 0, Source.NGRAM, Source.NONE)
    return under
