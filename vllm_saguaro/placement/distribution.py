"""Whether numbers that another process wrote are a distribution at all."""

from __future__ import annotations

import numpy as np

from vllm_saguaro.messages import Proposals

_TOLERANCE = 1e-4
"""Rows are made to sum to 1 in float32: a hundred candidates are off by a few 1e-6 at most."""
_ONE = int(np.float32(1 + _TOLERANCE).view(np.uint32))


def is_distribution(q: Proposals, vocab_size: int) -> bool:
    """Whether each row of `q` [D, M] is a distribution over different tokens of the vocabulary.

    Entries of probability 0 may have any token: a row narrower than M leaves there what was before.
    """
    # As bits, whatever is negative, infinite or no number is larger than 1.
    bits = q.probabilities.view(np.uint32)
    if np.maximum.reduce(bits, axis=None, initial=0) > _ONE:
        return False
    if any(abs(total - 1) > _TOLERANCE for total in np.add.reduce(q.probabilities, axis=1).tolist()):
        return False
    # Entries of probability 0 become negative numbers, each another one. No token is: it is read without a sign.
    tokens = np.where(bits, q.tokens.view(np.uint32), np.arange(-q.tokens.shape[1], 0))
    tokens.sort(axis=1)
    if max(tokens[:, -1].tolist(), default=0) >= vocab_size:
        return False
    return not (tokens[:, 1:] == tokens[:, :-1]).any()
