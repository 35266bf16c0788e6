from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from vllm_saguaro.algorithm.ngram import guess


def test_what_followed_the_same_passage_before() -> None:
    text = np.array([7, 1, 2, 3, 4, 5, 9, 1, 2, 3], dtype=np.int32)
    assert guess(text, 2).tolist() == [4, 5]
    assert guess(text, 9).tolist() == [4, 5, 9, 1, 2, 3]
    assert guess(text, 0).tolist() == []
    assert guess(text, 2, shortest=4).tolist() == []


def test_the_longest_passage_counts_and_the_first_of_equals() -> None:
    longer_later = np.array([2, 3, 4, 11, 1, 2, 3, 4, 22, 1, 2, 3, 4], dtype=np.int32)
    assert guess(longer_later, 1).tolist() == [22]
    equals = np.array([1, 2, 3, 11, 5, 1, 2, 3, 22, 6, 1, 2, 3], dtype=np.int32)
    assert guess(equals, 1).tolist() == [11]


_ASK_VLLM = """
import json, sys
import numpy as np
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find
plain = find.py_func  # as it is written, not compiled
for text, most, shortest, longest in json.load(sys.stdin):
    print(json.dumps(plain(np.array(text, dtype=np.int32), shortest, longest, 10_000, most).tolist()))
"""


def test_the_answers_are_vllms() -> None:
    """In a process of its own: with numba loaded, vLLM can start no CPU worker in this one any more."""
    pytest.importorskip("vllm")
    rng = random.Random(0)
    cases = []
    for _ in range(400):
        shortest = rng.randint(1, 3)
        text = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
        cases.append((text, rng.randint(1, 6), shortest, shortest + rng.randint(0, 4)))
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_VLLM], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("[")]
    assert answers == [guess(np.array(text, dtype=np.int32), *rest).tolist() for text, *rest in cases]
    assert sum(map(bool, answers)) > 100
