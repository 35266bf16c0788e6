"""What a request's own text suggests: prompt look-up, as vLLM's n-gram speculation does it.

The same answers as `_find_longest_matched_ngram_and_propose_tokens` (vLLM 0.32, `v1/spec_decode/ngram_proposer.py`), a
test compares them. Not that function itself: its module loads numba, and once that is loaded in a process, vLLM 0.32
cannot start another CPU worker there (`_rebind_kernels` in `triton_utils/dispatcher.py` fails at the objects of
llvmlite).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SHORTEST, LONGEST = 3, 5
"""Tokens that must match. Shorter matches are seldom right, and each guess costs a row of the verify pass."""


def guess(
    text: npt.NDArray[np.integer], most: int, shortest: int = SHORTEST, longest: int = LONGEST
) -> npt.NDArray[np.integer]:
    """At most `most` tokens that followed an earlier passage of the text [L] which ends like the text does.

    The longest passage counts, up to `longest` tokens, and the first of equals; empty where none has `shortest`.
    """
    last = len(text) - 1
    ends = np.flatnonzero(text[:last] == text[last]) if last > 0 and most > 0 else np.zeros(0, dtype=np.intp)
    found, length = ends, min(len(ends), 1)
    while len(ends) and length < longest:
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[last - length]]
        if len(ends):
            found, length = ends, length + 1
    if length < shortest:
        return text[:0]
    return text[found[0] + 1 : found[0] + 1 + most]
