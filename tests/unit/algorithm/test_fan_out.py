from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.algorithm.outcomes import fan_out_from_lengths, geometric_fan_out, uniform_fan_out

# Accepted lengths k = 0 .. 7 of rounds that hit, Llama-3.1-70B with a 1B draft, as published by a reproduction.
LLAMA_LENGTHS = [0.130, 0.094, 0.070, 0.058, 0.048, 0.042, 0.035, 0.523]

drafts = st.integers(0, 8)
branches = st.integers(0, 64)


@given(drafts, branches)
def test_uniform_shares_out_all_branches_evenly(n: int, total: int) -> None:
    fan_out = uniform_fan_out(n, total)
    assert len(fan_out) == n + 1
    assert sum(fan_out) == total
    assert max(fan_out) - min(fan_out) <= 1
    assert fan_out[n] == max(fan_out)


def test_uniform_gives_the_surplus_to_the_end_and_then_from_the_start() -> None:
    assert uniform_fan_out(3, 8) == [2, 2, 2, 2]
    assert uniform_fan_out(3, 9) == [2, 2, 2, 3]
    assert uniform_fan_out(3, 10) == [3, 2, 2, 3]
    assert uniform_fan_out(3, 2) == [1, 0, 0, 1]
    assert uniform_fan_out(0, 5) == [5]


@given(drafts, branches, st.floats(0.0, 1.0), st.floats(0.1, 4.0))
def test_geometric_shares_out_all_branches(n: int, total: int, acceptance: float, exponent: float) -> None:
    fan_out = geometric_fan_out(n, total, acceptance, exponent)
    assert len(fan_out) == n + 1
    assert sum(fan_out) == total
    assert min(fan_out) >= 0
    assert fan_out[:n] == sorted(fan_out[:n], reverse=True)
    if total >= n + 1 and 0.01 < acceptance < 0.99:
        assert min(fan_out) >= 1


@pytest.mark.parametrize(
    ("acceptance", "exponent", "expected"),
    [(0.8, 1.5, [4, 3, 3, 3, 3, 2, 2, 4]), (0.6, 0.86, [6, 5, 3, 3, 2, 2, 1, 2])],
)
def test_geometric_reproduces_the_worked_examples(acceptance: float, exponent: float, expected: list[int]) -> None:
    assert geometric_fan_out(7, 24, acceptance, exponent) == expected


@pytest.mark.parametrize(("exponent", "expected"), [(1.9, [3, 3, 3, 3, 2, 2, 2, 6]), (0.86, [3, 3, 3, 2, 2, 2, 2, 7])])
def test_a_measured_histogram_reproduces_the_worked_examples(exponent: float, expected: list[int]) -> None:
    assert fan_out_from_lengths(LLAMA_LENGTHS, 24, exponent) == expected


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.3, 3.0))
def test_integers_stay_near_the_papers_proportion(lengths: list[float], exponent: float) -> None:
    total = 200
    weights = [p ** (1 / (1 + exponent)) for p in lengths]
    for got, weight in zip(fan_out_from_lengths(lengths, total, exponent), weights, strict=True):
        assert got == pytest.approx(total * weight / sum(weights), abs=3)


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5), st.integers(6, 30), st.floats(0.3, 3.0), st.data())
def test_no_single_move_of_a_branch_hits_more(
    lengths: list[float], total: int, exponent: float, data: st.DataObject
) -> None:
    def missed(fan_out: list[int]) -> float:
        return sum(p * f**-exponent for p, f in zip(lengths, fan_out, strict=True))

    best = fan_out_from_lengths(lengths, total, exponent)
    other = list(best)
    giver, taker = data.draw(st.permutations(range(len(lengths))))[:2]
    if other[giver] > 1:
        other[giver] -= 1
        other[taker] += 1
        assert missed(best) <= missed(other) + 1e-9


def test_few_branches_go_to_the_likeliest_lengths() -> None:
    assert fan_out_from_lengths([0.3, 0.2, 0.1, 0.4], 2, 1.0) == [1, 0, 0, 1]
    assert fan_out_from_lengths([0.3, 0.2, 0.1, 0.4], 0, 1.0) == [0, 0, 0, 0]


def test_an_impossible_length_gets_nothing() -> None:
    assert fan_out_from_lengths([1.0, 0.0, 0.0], 6, 1.0) == [6, 0, 0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="positive probability"):
        fan_out_from_lengths([0.0, 0.0], 4, 1.0)
    with pytest.raises(ValueError, match="exponent"):
        fan_out_from_lengths([0.5, 0.5], 4, 0.0)
