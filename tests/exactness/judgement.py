"""How likely samples at least so far from the exact probabilities are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from tests.e2e.exact import SMALLEST_EXPECTED, chi_square_p
from tests.exactness.models import EMITTED, PROMPT, VOCABULARY, Floats, Setting, conditionals, draft_logits, joint
from tests.exactness.rounds import Samples
from tests.exactness.speculation import Source

Chosen = npt.NDArray[np.bool_]

SMALLEST_P = 1e-5
"""No p value of a right sampler lies below, of the few thousand that are looked at. Seeds are fixed."""
PLANTED_P = 1e-8
"""A planted error is one that brings some p value below this."""

_FEWEST = 1000
"""Tokens of a kind, below which they are not looked at by themselves."""


def p_values(samples: Samples, setting: Setting, by_source: bool) -> dict[str, float]:
    """Every test of one cell, by name.

    `by_source`: the tokens of passes with drafts of one source by themselves, and by their place in the pass. Not for
    coupled drafts: whether an outcome is predicted depends there on the noise of later tokens, so that the tokens after
    a hit, looked at by themselves, are no fair sample. All together are.
    """
    everything = samples.place >= 0
    found = {
        "texts": texts_p(samples, setting),
        "tokens": tokens_p(samples, setting, everything),
        "order": order_p(samples, setting, everything),
    }
    if by_source:
        for source, place in product(Source, range(int(samples.place.max()) + 1)):
            chosen = (samples.source == source) & (samples.place == place)
            if chosen.sum() >= _FEWEST:
                name = f"{source.name.lower()}, token {place + 1}"
                found[name] = tokens_p(samples, setting, chosen)
                found[f"{name}, order"] = order_p(samples, setting, chosen)
    return found


def texts_p(samples: Samples, setting: Setting) -> float:
    """Chi-square of the texts of EMITTED tokens, V^EMITTED cells."""
    counts = np.bincount(_numbers(samples.outputs)[-1], minlength=VOCABULARY**EMITTED)
    return chi_square_p(counts, joint(setting) * len(samples.outputs))


def tokens_p(samples: Samples, setting: Setting, chosen: Chosen) -> float:
    """Chi-square of the `chosen` tokens [R, EMITTED], each given the tokens before it.

    Every prefix has a chi-square of its own, and these are added: whether a token is looked at may depend on what came
    before it.
    """
    statistic, freedom = 0.0, 0
    for counts, p, _ in _by_prefix(samples, setting, chosen):
        totals = counts.sum(1)
        for prefix in np.flatnonzero(totals):
            added = _pooled(counts[prefix], p[prefix] * totals[prefix])
            statistic, freedom = statistic + added[0], freedom + added[1]
    return _upper(statistic, freedom)


def order_p(samples: Samples, setting: Setting, chosen: Chosen) -> float:
    """How often the `chosen` tokens are the draft's likeliest, its second, .. : few cells, which see small errors of q.

    d = sum (e - p) over the tokens, e and p in the draft's order;  d' C^+ d ~ chi-square with rank C degrees, where
    C = sum (diag p - p p').
    """
    d, c = np.zeros(VOCABULARY), np.zeros((VOCABULARY, VOCABULARY))
    for counts, p, order in _by_prefix(samples, setting, chosen):
        counts, p = np.take_along_axis(counts, order, 1), np.take_along_axis(p, order, 1)
        totals = counts.sum(1, keepdims=True)
        d += (counts - totals * p).sum(0)
        c += np.diag((totals * p).sum(0)) - (totals * p).T @ p
    if not c.any():
        return 1.0
    return _upper(float(d @ np.linalg.pinv(c, rcond=1e-9) @ d), np.linalg.matrix_rank(c, tol=1e-9 * np.trace(c)))


def _by_prefix(
    samples: Samples, setting: Setting, chosen: Chosen
) -> Iterator[tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.int64]]]:
    """For every position: counts [V^i, V] of its chosen tokens by prefix, their p, and the draft's order of tokens.

    AssertionError where one of them has no probability at all.
    """
    numbers = _numbers(samples.outputs)
    for at, p in enumerate(conditionals(setting)):
        rows = chosen[:, at]
        counts = np.bincount(numbers[at + 1][rows], minlength=p.size).reshape(p.shape)
        assert not (counts[p == 0] > 0).any(), "a token that the target can never give"
        texts = np.array([(*PROMPT, *text)[-2:] for text in product(range(VOCABULARY), repeat=at)])
        yield counts, p, np.argsort(-draft_logits().numpy()[texts[:, 0], texts[:, 1]], axis=1)


def _numbers(outputs: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The number [R] of each text of 0 .. EMITTED tokens, with base V."""
    found = [np.zeros(len(outputs), dtype=np.int64)]
    for at in range(EMITTED):
        found.append(found[-1] * VOCABULARY + outputs[:, at])
    return found


def _pooled(observed: npt.NDArray[np.int64], expected: Floats) -> tuple[float, int]:
    """The statistic and its degrees of freedom; cells with small expectations go to the one before."""
    pools: list[list[float]] = []
    for index in np.argsort(expected)[::-1]:
        if pools and expected[index] < SMALLEST_EXPECTED:
            pools[-1][0] += observed[index]
            pools[-1][1] += expected[index]
        else:
            pools.append([observed[index], expected[index]])
    return sum((o - e) ** 2 / e for o, e in pools), len(pools) - 1


def _upper(statistic: float, freedom: int) -> float:
    """P(chi-square >= statistic)."""
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1])) if freedom else 1.0
