"""The target's exact next-token probabilities, from Hugging Face transformers, and a test of samples against them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from tests.e2e.harness import TARGET, Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BINS = 16
SMALLEST_EXPECTED = 8.0


@cache
def target() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@cache
@torch.no_grad()
def logits_after(texts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The target's logits [texts, V] of what follows each text (all equally long)."""
    parts = torch.tensor(texts).split(256)
    return torch.cat([target()(part, logits_to_keep=1).logits[:, -1] for part in parts])


def probabilities(prompt: Sequence[int], prefixes: Sequence[Sequence[int]], params: Json) -> np.ndarray:
    """p [prefixes, V] of the token that follows the prompt and each prefix, as vLLM samples it."""
    logits = logits_after(tuple((*prompt, *prefix) for prefix in prefixes)).double() / params["temperature"]
    if "allowed_token_ids" in params:
        allowed = torch.tensor(params["allowed_token_ids"])
        logits = torch.full_like(logits, -torch.inf).index_copy_(1, allowed, logits[:, allowed])
    if "top_k" in params:
        smallest = logits.topk(params["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(-1)
    if "top_p" in params:
        ordered, order = p.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= params["top_p"]  # what comes before it is enough already
        p = p.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p.numpy()


class Contexts:
    """The exact distribution after each text that occurs among some samples."""

    def __init__(self, prompt: Sequence[int], samples: Sequence[Sequence[int]], params: Json) -> None:
        self._p: dict[tuple[int, ...], np.ndarray] = {}
        for length in range(len(samples[0])):
            prefixes = sorted({tuple(sample[:length]) for sample in samples})
            self._p |= dict(zip(prefixes, probabilities(prompt, prefixes, params), strict=True))

    def __getitem__(self, prefix: Sequence[int]) -> np.ndarray:
        return self._p[tuple(prefix)]


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """How likely counts at least so far from the expected ones are. Small expectations are pooled, the largest last."""
    order = np.argsort(expected)
    pooled: list[tuple[float, float]] = []
    seen = wanted = 0.0
    for index in order:
        seen, wanted = seen + observed[index], wanted + expected[index]
        if wanted >= SMALLEST_EXPECTED:
            pooled.append((seen, wanted))
            seen = wanted = 0.0
    if not pooled:
        return 1.0
    pooled[-1] = (pooled[-1][0] + seen, pooled[-1][1] + wanted)
    if any(w <= 0 < s for s, w in pooled):
        return 0.0
    if len(pooled) == 1:
        return 1.0
    statistic = sum((s - w) ** 2 / w for s, w in pooled)
    halves = torch.tensor([(len(pooled) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def first_token_p(samples: Sequence[Sequence[int]], contexts: Contexts) -> float:
    """Of the first token, over the whole vocabulary."""
    p = contexts[()]
    return chi_square_p(np.bincount([sample[0] for sample in samples], minlength=len(p)), p * len(samples))


def second_token_p(samples: Sequence[Sequence[int]], contexts: Contexts) -> float:
    """Of the second token, after the first token that occurs most often."""
    firsts = [sample[0] for sample in samples]
    most = max(set(firsts), key=firsts.count)
    p = contexts[(most,)]
    seconds = [sample[1] for sample in samples if sample[0] == most]
    return chi_square_p(np.bincount(seconds, minlength=len(p)), p * len(seconds))


def rank_p(
    samples: Sequence[Sequence[int]], contexts: Contexts, positions: int | range, rng: np.random.Generator
) -> float:
    """Of all samples of one or several positions, whatever came before each (the probability integral transform).

    Each sample becomes a number that is uniform on [0, 1) if its token was drawn from p: the mass of the likelier
    tokens, plus a random part of its own. Too many likely tokens, as from drafts accepted too often, crowd at 0.
    """
    places = []
    at = range(positions, positions + 1) if isinstance(positions, int) else positions
    for sample, position in itertools.product(samples, at):
        p = contexts[sample[:position]]
        own = p[sample[position]]
        if own == 0.0:
            return 0.0  # a token that cannot be drawn
        tied_before = (p[: sample[position]] == own).sum() * own
        places.append(p[p > own].sum() + tied_before + own * rng.random())
    counts = np.histogram(places, bins=BINS, range=(0.0, 1.0 + 1e-9))[0]
    return chi_square_p(counts, np.full(BINS, len(places) / BINS))


def draft_p(samples: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], contexts: Contexts) -> float:
    """Of how often the second token is the draft that was proposed for it, where one was.

    The draft is chosen before the token is drawn, so the token is equal to it with probability p(draft).
    """
    drafted = [(sample, draft[0]) for sample, draft in zip(samples, drafts, strict=True) if draft]
    chances = np.array([contexts[sample[:1]][draft] for sample, draft in drafted])
    taken = sum(sample[1] == draft for sample, draft in drafted)
    spread = math.sqrt((chances * (1 - chances)).sum())
    return math.erfc(abs(taken - chances.sum()) / spread / math.sqrt(2)) if spread else 1.0


def all_p(
    samples: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], contexts: Contexts, seed: int = 0
) -> dict[str, float]:
    """Every test of a set of samples, by name. `drafts`: what was proposed after each sample's first token."""
    rng = np.random.default_rng(seed)
    found = {
        "first token": first_token_p(samples, contexts),
        "second token": second_token_p(samples, contexts),
        "draft taken": draft_p(samples, drafts, contexts),
    }
    return found | {f"rank at {at}": rank_p(samples, contexts, at, rng) for at in range(len(samples[0]))}
