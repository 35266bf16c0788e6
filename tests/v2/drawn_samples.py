"""How likely the samples of `v2_plans.drawn` are under the target's own probabilities."""

from __future__ import annotations

import numpy as np

from tests.e2e.exact import Contexts, chi_square_p
from tests.v2 import v2_plans
from tests.v2.v2_runs import Scripted


def samples_p(found: Scripted) -> float:
    """Of which of the likeliest tokens each one is, the first left out, which no draft has touched."""
    contexts = Contexts(v2_plans.SAMPLED_PROMPT, found.tokens, v2_plans.DRAWN)
    count = v2_plans.DRAWN["top_k"]
    observed, expected = np.zeros(count + 1), np.zeros(count + 1)  # the last: what cannot be drawn
    for text in found.tokens:
        for position in range(1, len(text)):
            p = contexts[text[:position]]
            likeliest = np.argsort(-p)[:count]
            expected[:count] += p[likeliest]
            at = np.flatnonzero(likeliest == text[position])
            observed[at[0] if at.size else count] += 1
    return chi_square_p(observed, expected)
