from __future__ import annotations

import dataclasses
from itertools import accumulate
from operator import mul

import pytest

from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.drafting.pace import Pace

K = 3


def informed(most: int, *, available: float, glue: float, base: float, per_row: float, rank: int | None = None) -> Pace:
    """A pace that has seen many rounds, with all outcomes at `rank` (None: half of them missed, the others spread)."""
    pace = Pace(K, most, chooses=True)
    for i in range(2000):
        pace.observe_glue(glue)
        for rows in (1, 10, 100):
            pace.observe_step(rows, base + per_row * rows)
        pace.observe_round(1.0, available)
        spread = i % (2 * most)
        pace.observe_forecast(rank if rank is not None else spread if spread < most else None, K, K)
    return pace


def test_without_a_choice_n_is_what_it_is() -> None:
    pace = Pace(K, 17, chooses=False)
    for _ in range(50):
        pace.observe_round(1.0, 0.001)
        pace.observe_step(10, 1.0)
    assert pace.branches(1) == pace.branches(200) == 17


def test_until_something_is_known_n_is_moderate() -> None:
    assert Pace(K, 64, chooses=True).branches(1) == 12
    assert Pace(K, 5, chooses=True).branches(1) == 5


@pytest.mark.parametrize("most", [20, 24, 256])
def test_branches_that_cost_nothing_are_all_taken(most: int) -> None:
    """Also where the most is none of the usual numbers."""
    pace = informed(most, available=0.02, glue=0.001, base=0.001, per_row=0.0)
    assert pace.branches(1) == most


def test_branches_that_cost_a_depth_are_not_taken() -> None:
    """.95 * 20 ms - 1 ms = 18 ms for three steps of 1 ms + .2 ms a row: 25 rows, of 24 and 32 the former."""
    pace = informed(64, available=0.02, glue=0.001, base=0.001, per_row=0.0002)
    assert pace.branches(1) == 24
    assert pace.branches(2) == 12
    assert pace.branches(4) == 6


def test_the_ranks_of_outcomes_decide_what_a_depth_is_worth() -> None:
    """18 ms for steps of 1 ms + .5 ms a row: three depths with 8 branches, two with 12."""
    costs = {"available": 0.02, "glue": 0.001, "base": 0.001, "per_row": 0.0005}
    assert informed(64, **costs, rank=7).branches(1) == 8
    assert informed(64, **costs, rank=8).branches(1) == 12


def test_reach_is_learnt_of_what_was_judged_alone() -> None:
    pace = Pace(K, 8, chooses=True)
    for _ in range(3000):
        pace.observe_forecast(0, 1, 3)  # x_1 accepted, x_2 rejected, nothing known of x_3
        pace.observe_forecast(0, 2, 2)  # x_1 and x_2 accepted, x_3 was not in the pass
    rates = [1.0, 0.5, 0.7]  # the third is the prior
    assert pace.reach() == pytest.approx(list(accumulate(rates, mul)), abs=0.01)
    p = pace.accepted_lengths()
    assert p == pytest.approx([0.0, 0.5, 0.15, 0.35], abs=0.01)
    assert sum(p) == pytest.approx(1)


def test_more_accepted_than_k_cannot_be() -> None:
    pace = Pace(K, 8, chooses=True)
    pace.observe_forecast(None, 7, 9)
    assert len(pace.reach()) == K
    assert len(pace.accepted_lengths()) == K + 1


def test_a_round_takes_longer_with_more_tokens_in_it() -> None:
    pace = Pace(K, 8, chooses=True)
    assert pace.round_time(1.0) == 0.0
    for _ in range(100):
        for tokens in (1.0, 2.5, 4.0):
            pace.observe_round(tokens, 0.01 + 0.002 * tokens)
    assert pace.round_time(1.0) == pytest.approx(0.012, rel=0.02)
    assert pace.round_time(4.0) == pytest.approx(0.018, rel=0.02)


def test_a_step_is_too_late_by_its_rows_and_by_the_tokens_of_the_pass() -> None:
    pace = Pace(K, 8, chooses=False)
    assert not pace.too_late(8, 4.0, elapsed=1.0), "nothing was measured"
    for tokens in (1.0, 2.0, 4.0) * 50:
        pace.observe_round(tokens, 0.01 + 0.002 * tokens)
        for rows in (1, 8):
            pace.observe_step(rows, 0.002 + 0.0005 * rows)
    # A pass over 4 tokens takes 18 ms , a step over 8 rows 6 ms, over one 2.5 ms.
    assert not pace.too_late(8, 4.0, elapsed=0.0115)
    assert pace.too_late(8, 4.0, elapsed=0.0125)
    assert not pace.too_late(1, 4.0, elapsed=0.0125)
    assert pace.too_late(1, 1.0, elapsed=0.0100), "a pass over one token takes 12 ms"
    assert not pace.too_late(8, 4.0, elapsed=0.0230), "long overdue"


# ---- what was measured before the start --------------------------------------------------------------------------

PRIORS = Priors(
    target_pass=(0.019, 0.00025),
    draft_step=(0.001, 0.0002),
    glue=0.001,
    acceptance=(0.9, 0.8),
    hits=((1, 0.3), (12, 0.7), (24, 0.9), (48, 0.95)),
)


def test_what_was_measured_before_decides_the_first_round() -> None:
    """A pass of four tokens takes 20 ms: 18 ms are left for three steps of 1 ms + .2 ms a row, 24 rows fit."""
    pace = Pace(K, 48, chooses=True, priors=PRIORS)
    assert pace.branches(1) == 24
    hurried = dataclasses.replace(PRIORS, target_pass=(0.009, 0.00025))
    assert Pace(K, 48, chooses=True, priors=hurried).branches(1) == 12, "two steps fit, over twelve rows"
    assert pace.reach() == pytest.approx([0.9, 0.72, 0.576])


def test_what_is_seen_later_counts_more() -> None:
    pace = Pace(K, 48, chooses=True, priors=PRIORS)
    for _ in range(500):
        pace.observe_forecast(0, 0, K)
        pace.observe_glue(0.001)
        pace.observe_step(12, 0.02)
        pace.observe_step(48, 0.08)
        pace.observe_round(4.0, 0.02)
    assert pace.reach()[0] < 0.1
    assert pace.branches(1) < 12
