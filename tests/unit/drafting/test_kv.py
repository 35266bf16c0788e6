from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.drafting.kv import BlockPool, blocks_for, branch_span, pad_blocks


@given(st.lists(st.integers(0, 6), max_size=30))
def test_a_block_has_at_most_one_owner(counts: list[int]) -> None:
    pool = BlockPool(10)
    held: list[list[int]] = []
    for count in counts:
        before = pool.num_free
        taken = pool.take(count)
        if taken is None:
            assert count > before
            assert pool.num_free == before
            if held:
                pool.give(held.pop(0))
        else:
            assert len(taken) == count
            held.append(taken)
        owned = [block for blocks in held for block in blocks]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(10))
        assert pool.num_free + len(owned) == 10


def test_warm_blocks_are_used_again_first() -> None:
    pool = BlockPool(8)
    pool.take(3)
    last = pool.take(1)
    assert last is not None
    pool.give(last)
    assert pool.take(1) == last


@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([1, 4, 8]))
def test_a_branch_owns_exactly_the_blocks_that_it_writes(position: int, steps: int, block_size: int) -> None:
    span = branch_span(position, steps, block_size)
    written = {p // block_size for p in range(position, position + steps)}
    assert set(range(span.first, span.first + span.count)) == written
    assert span.copies == any(p // block_size == span.first for p in range(position))


@given(st.integers(0, 100), st.sampled_from([1, 4, 8]))
def test_blocks_for_is_the_least_number_that_holds_the_text(length: int, block_size: int) -> None:
    count = blocks_for(length, block_size)
    assert count * block_size >= length > (count - 1) * block_size - (length == 0)


def test_block_tables_are_padded_with_zero() -> None:
    table = pad_blocks([[5], [7, 8, 9]])
    assert table.dtype == np.int32
    assert table.tolist() == [[5, 0, 0], [7, 8, 9]]
