"""The tests of the engine are worth what their model notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.model import Batch

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def batch(tokens: list[int], first: int, blocks: list[int]) -> Batch:
    return rows([(tokens, first, blocks)])


def rows(parts: list[tuple[list[int], int, list[int]]]) -> Batch:
    counts = [len(tokens) for tokens, _, _ in parts]
    return Batch(
        token_ids=np.concatenate([np.array(tokens, dtype=np.int64) for tokens, _, _ in parts]),
        positions=np.concatenate([np.arange(first, first + len(tokens)) for tokens, first, _ in parts]),
        query_start=np.cumsum([0, *counts]).astype(np.int32),
        lengths=np.array([first + len(tokens) for tokens, first, _ in parts], dtype=np.int32),
        blocks=np.array([blocks for _, _, blocks in parts], dtype=np.int32),
    )


def test_paged_answers_equal_the_oracle() -> None:
    model = FakeModel()
    hidden = torch.cat([model.forward(batch(TEXT[:6], 0, [5, 2, 7])), model.forward(batch(TEXT[6:], 6, [5, 2, 7]))])
    logits = model.logits(hidden)
    for length in range(1, len(TEXT) + 1):
        assert torch.equal(logits[length - 1], model.logits_after(TEXT[:length]))
    assert model.greedy(hidden)[-1] == model.greedy_continuation(TEXT, 1)[0]


def test_a_stale_block_changes_the_answer() -> None:
    model = FakeModel()
    model.forward(batch(TEXT[:9], 0, [5, 2, 7]))
    model.wipe([2])
    assert not torch.equal(model.logits(model.forward(batch(TEXT[9:], 9, [5, 2, 7])))[0], model.logits_after(TEXT))


def test_a_wrong_block_table_changes_the_answer() -> None:
    model = FakeModel()
    model.forward(batch(TEXT[:9], 0, [5, 2, 7]))
    assert not torch.equal(model.logits(model.forward(batch(TEXT[9:], 9, [2, 5, 7])))[0], model.logits_after(TEXT))


def test_the_likeliest_token_is_unambiguous() -> None:
    model = FakeModel()
    for length in range(1, len(TEXT) + 1):
        best = model.logits_after(TEXT[:length]).topk(2).values
        assert best[0] - best[1] > 1e-4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (batch([1], 0, [64]), "out of range"),
        (batch([1] * 9, 0, [1, 2, 3]), "tokens"),
        (batch([1], 64, list(range(17))), "maximum length"),
        (batch([40], 0, [1]), "vocabulary"),
        (batch([1] * 5, 0, [1]), "too short"),
        (rows([([1], 0, [3]), ([2], 0, [3])]), "another row"),
        (rows([([1], 0, [1]), ([2], 0, [2]), ([2], 0, [3])]), "rows"),
    ],
)
def test_bad_batches_are_refused(bad: Batch, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        FakeModel(max_tokens=8, max_rows=2).forward(bad)
