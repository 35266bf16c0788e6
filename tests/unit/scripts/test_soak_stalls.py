from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking.stalls import Gaps, added, quantile


def test_a_gap_belongs_to_the_window_that_it_touches() -> None:
    gaps = Gaps()
    gaps.piece(0.0, 0.02)
    window = gaps.open(1.0)
    gaps.piece(0.9, 1.5)  # began before it
    gaps.piece(1.5, 1.9)
    window.end = 2.0
    gaps.piece(1.9, 2.7)  # ended after it
    gaps.piece(2.7, 2.72)
    assert window.longest == pytest.approx(0.8)
    assert window.longest_at == (1.9, 2.7)
    assert sum(gaps.usual.values()) == 2
    assert gaps.longest_usual == pytest.approx(0.02)


def test_a_window_that_has_not_begun_takes_nothing() -> None:
    gaps = Gaps()
    window = gaps.open(float("inf"))
    gaps.piece(0.0, 5.0)
    assert window.longest == 0
    assert gaps.longest_usual == 5


def test_a_forgotten_window_takes_nothing_more() -> None:
    gaps = Gaps()
    window = gaps.open(0.0)
    gaps.forget(window)
    gaps.piece(1.0, 9.0)
    assert window.longest == 0


def test_quantiles_are_right_to_a_bin() -> None:
    gaps = Gaps()
    for number in range(1, 1001):
        gaps.piece(0.0, number / 1000)
    assert quantile(gaps.usual, 0.5) == pytest.approx(0.5, rel=0.13)
    assert quantile(gaps.usual, 0.99) == pytest.approx(0.99, rel=0.13)
    assert quantile({}, 0.5) == 0


def test_bins_of_several_slices_add_up() -> None:
    assert added([{"-3": 2, "1": 1}, {"-3": 5}]) == {-3: 7, 1: 1}
