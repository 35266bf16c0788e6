from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.unit.placement.soundness import assert_sound_q
from vllm_saguaro.messages import Proposals
from vllm_saguaro.placement.distribution import is_distribution
from vllm_saguaro.placement.layout import MailboxShape

VOCAB = 50
SHAPE = MailboxShape(1, 1, 8, ring_bytes=8, support=4, vocab_size=VOCAB)


def q(tokens: Any, probabilities: Any) -> Proposals:
    return Proposals(np.array(tokens, np.int32), np.array(probabilities, np.float32))


SOUND = [[3, 49, 0, 7], [7, 3, 1, 2]], [[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_distributions_are_taken_as_such() -> None:
    assert is_distribution(q(*SOUND), VOCAB)
    assert is_distribution(q(np.zeros((0, 4)), np.zeros((0, 4))), VOCAB)


@pytest.mark.parametrize("token", [-1, 3, VOCAB, -(2**31), 2**31 - 1])
def test_a_candidate_that_cannot_be_drawn_may_have_any_token(token: int) -> None:
    tokens, probabilities = np.array(SOUND[0]), SOUND[1]
    tokens[0, 3] = token
    assert is_distribution(q(tokens, probabilities), VOCAB)


@pytest.mark.parametrize("token", [-1, VOCAB, 49, 0, -(2**31), 2**31 - 1])
def test_a_token_outside_the_vocabulary_or_twice_in_a_row_is_no_distribution(token: int) -> None:
    tokens = np.array(SOUND[0])
    tokens[0, 0] = token
    assert not is_distribution(q(tokens, SOUND[1]), VOCAB)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.25, 0.3, 0.2, 1.5, 0.0, -np.nan, 3e38])
def test_numbers_that_are_no_distribution_are_refused(value: float) -> None:
    probabilities = np.array(SOUND[1])
    probabilities[0, 1] = value
    assert not is_distribution(q(SOUND[0], probabilities), VOCAB)


def test_two_wrong_numbers_do_not_make_up_for_each_other() -> None:
    assert not is_distribution(q([[0, 1, 2, 3]], [[-0.5, 0.75, 0.75, 0.0]]), VOCAB)
    assert not is_distribution(q([[0, 1, 2, 3], [0, 1, 2, 3]], [[0.5, 0.0, 0.0, 0.0], [0.75, 0.75, 0.0, 0.0]]), VOCAB)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32))
def test_whatever_is_made_to_sum_to_one_in_float32_does(width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = np.exp(random.normal(size=(4, width)) * 5).astype(np.float32)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    tokens = np.stack([random.permutation(200)[:width] for _ in range(4)])
    assert is_distribution(q(tokens, probabilities), 200)


@settings(deadline=None)
@given(
    arrays.arrays(np.int32, (2, 4), elements=st.integers(-1, 52) | st.integers(-(2**31), 2**31 - 1)),
    arrays.arrays(np.uint32, (2, 4)) | arrays.arrays(np.float32, (2, 4), elements=st.sampled_from([0, 0.25, 0.5, 1])),
)
def test_any_numbers_are_a_distribution_or_refused(tokens: np.ndarray, numbers: np.ndarray) -> None:
    found = Proposals(tokens, numbers.view(np.float32))
    if is_distribution(found, VOCAB):
        assert_sound_q(found, 2, SHAPE)
