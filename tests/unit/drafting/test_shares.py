"""Blocks and rows that several engines share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.drafting.shares import BlockShare, BlockShares, fair_parts


def test_an_engine_alone_may_have_all_blocks() -> None:
    share = BlockShares(10).join()
    assert (share.num_blocks, share.num_free) == (10, 10)
    assert share.take(11) is None
    taken = share.take(10)
    assert taken is not None
    assert sorted(taken) == list(range(10))
    assert share.take(1) is None
    share.give(taken[:4])
    assert share.num_free == 4


def test_beside_others_one_gets_its_part_and_nothing_of_theirs() -> None:
    shares = BlockShares(12)
    big, small = shares.join(), shares.join()
    assert big.take(7) is None, "half of them are the other's to take"
    assert big.take(6) is not None
    assert small.take(2) is not None
    assert (big.num_free, small.num_free) == (0, 4)


def test_a_newcomer_gets_its_part_as_soon_as_blocks_come_free() -> None:
    shares = BlockShares(12)
    big = shares.join()
    held = big.take(12)
    assert held is not None
    small = shares.join()
    assert small.take(1) is None
    big.give(held[:5])
    assert big.num_free == 0, "it is above its part, and the other below"
    assert small.take(5) is not None


def test_what_an_engine_had_is_free_once_it_has_left() -> None:
    shares = BlockShares(12)
    leaving, staying = shares.join(), shares.join()
    leaving.take(5)
    staying.take(3)
    shares.leave(leaving)
    assert (shares.num_free, staying.num_free, len(shares)) == (9, 9, 1)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "give", "leave"]), st.integers(1, 9)), max_size=60)
)
def test_no_block_has_two_owners_and_every_engine_comes_to_its_part(steps: list[tuple[int, str, int]]) -> None:
    shares = BlockShares(24)
    engines: list[BlockShare] = [shares.join() for _ in range(3)]
    for who, what, count in steps:
        engine = engines[who]
        if what == "take":
            engine.take(count)
        elif what == "give":
            engine.give(sorted(engine.taken)[:count])
        else:
            shares.leave(engine)
            engines[who] = shares.join()
        held = [block for one in engines for block in one.taken]
        assert len(set(held)) == len(held)
        assert shares.num_free + len(held) == 24
        for one in engines:
            others_beyond = sum(max(0, len(other.taken) - 8) for other in engines if other is not one)
            assert len(one.taken) + one.num_free >= 8 - others_beyond, (
                "its part, but for what others had before it came"
            )


def test_who_asks_for_little_gets_it_and_the_rest_is_shared_alike() -> None:
    assert fair_parts([256, 12], 256) == [244, 12]
    assert fair_parts([256, 256, 10], 250) == [120, 120, 10]
    assert fair_parts([5, 0], 256) == [5, 0]
    assert fair_parts([], 256) == []


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 600))
def test_parts_are_fair(demands: list[int], total: int) -> None:
    parts = fair_parts(demands, total)
    assert sum(parts) <= total
    for part, demand in zip(parts, demands, strict=True):
        assert part <= demand
        assert part >= min(demand, total // len(demands)), "never less than an equal part"
        if part < demand:
            assert part >= max(parts) - 1, "who goes short has as much as anybody"
    assert sum(parts) == min(total, sum(demands)), "nothing is left while somebody wants it"
