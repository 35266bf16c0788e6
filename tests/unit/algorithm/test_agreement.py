from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.algorithm.agreement import agreed

K = 3
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=K + 1, max_size=K + 1), st.lists(st.integers(-1, 2), max_size=K)),
    min_size=1,
    max_size=5,
)
"""Of each request: what the target says after each row, and its drafts."""


def ran(requests: list[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[int]]:
    drawn, drafts, begins = list[int](), list[int](), [0]
    places = list[int]()
    for says, fed in requests:
        drawn += says[: len(fed) + 1]
        drafts += [99, *fed]  # the first row is fed the last token of the text
        places += range(len(fed) + 1)
        begins.append(len(drawn))
    found, counts = agreed(
        torch.tensor(drawn),
        torch.tensor(drafts),
        torch.tensor(begins, dtype=torch.int32),
        torch.tensor(places, dtype=torch.int32),
        K,
    )
    assert (found.dtype, counts.dtype) == (torch.int64, torch.int32)
    assert found.shape == (len(requests), K + 1)
    return found.tolist(), counts.tolist()


@given(REQUESTS)
def test_what_counts_is_what_the_target_says_one_token_after_the_other(
    requests: list[tuple[list[int], list[int]]],
) -> None:
    tokens, counts = ran(requests)
    for (says, fed), row, count in zip(requests, tokens, counts, strict=True):
        expected = [says[0]]
        for place, draft in enumerate(fed):
            if draft != says[place]:
                break
            expected.append(says[place + 1])
        assert row[:count] == expected


def test_a_draft_that_is_marked_ends_it_although_it_is_right() -> None:
    assert ran([([0, 1, 2, 0], [0, -1, 2])])[1] == [2]
