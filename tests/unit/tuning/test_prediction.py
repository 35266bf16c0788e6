"""From planted observations back to the times, rates and the K that they were made with."""

from __future__ import annotations

import pytest

from vllm_saguaro.simulation.world import WorldError
from vllm_saguaro.tuning import prediction
from vllm_saguaro.tuning.candidates import shortlist
from vllm_saguaro.tuning.observations import Observations

N = 24
FORK = 0.001


def pass_seconds(tokens: int) -> float:
    return 0.02 + 0.0005 * tokens


def step_seconds(rows: int) -> float:
    return 0.002 + 0.00001 * rows


def planted(acceptance: float = 0.8, hit_rate: float = 0.9, drafts: int = 8, step: float = 1.0) -> Observations:
    """A machine whose passes and steps are lines; each draft is accepted with the same chance."""
    seen = Observations()
    for rows in (1, 4):
        for tokens in range(rows, rows * (drafts + 1) + 1):
            for _ in range(10):
                seen.add_pass(rows, tokens, pass_seconds(tokens))
        wide = rows * N
        for depth in range(1, drafts + 1):
            glue = FORK + step * step_seconds(rows)
            for _ in range(10):
                seen.add_table(rows, depth, glue + depth * step * step_seconds(wide))
    left = 4000
    for _ in range(drafts):
        seen.tried.append(left)
        seen.accepted.append(round(acceptance * left))
        left = seen.accepted[-1]
    for rank in range(N):
        seen.ranks[rank] = 1
    seen.ranks[0] = round(1000 * hit_rate) - (N - 1)
    seen.not_predicted = 1000 - round(1000 * hit_rate)
    return seen


def test_times_of_passes_are_found_again() -> None:
    times = prediction.target_times(planted())
    for tokens in (2, 8, 20, 36):
        assert times.at(tokens) == pytest.approx(pass_seconds(tokens), rel=0.03)


def test_times_of_steps_and_the_rest_of_a_round_are_found_again() -> None:
    times, fork = prediction.draft_times(planted(), N)
    for rows in (N, 2 * N, 4 * N):
        assert times.at(rows) == pytest.approx(step_seconds(rows), rel=0.02)
    assert fork == pytest.approx(FORK, abs=0.0006)


def test_one_depth_alone_is_divided_among_its_forwards() -> None:
    seen = Observations()
    seen.add_table(1, 4, 0.010)
    times, fork = prediction.draft_times(seen, 12)
    assert times.at(12) == pytest.approx(0.002)
    assert times.at(1) < 0.002, "fewer rows are not dearer"
    assert fork < 0.002


def test_a_pass_is_never_shorter_than_a_smaller_one() -> None:
    seen = Observations()
    for tokens, seconds in ((1, 0.02), (4, 0.01), (16, 0.03)):
        seen.add_pass(1, tokens, seconds)
    times = prediction.target_times(seen)
    assert times.at(1) <= times.at(4) <= times.at(16)


def test_the_hit_curve_goes_through_what_was_counted() -> None:
    seen = planted(hit_rate=0.9)
    curve = prediction.hit_curve(seen, N)
    for n in (1, 4, 12, 24):
        assert curve.at(n) == pytest.approx(seen.hit_rate(n), abs=0.003)


def test_outcomes_that_always_hit_are_a_constant() -> None:
    seen = Observations()
    seen.ranks[0] = 50
    assert prediction.hit_curve(seen, N).at(7) == 1.0


@pytest.mark.parametrize("lacks", ["passes", "tables", "outcomes"])
def test_what_was_not_seen_at_all_is_said(lacks: str) -> None:
    seen = planted()
    if lacks == "passes":
        seen.passes.clear()
    elif lacks == "tables":
        seen.tables.clear()
    else:
        seen.ranks.clear()
        seen.not_predicted = 0
    with pytest.raises(WorldError, match=r"was seen|met a table"):
        prediction.world_of(seen, seen, N, 8)


def best_pair(seen: Observations) -> tuple[int, int]:
    worlds = {0.0: prediction.world_of(seen, seen, N, 8)}
    plain = {(1, 0.0): 1 / pass_seconds(1)}
    predicted = prediction.predictions(worlds, plain, (1, 2, 4, 8), (2, 24))
    return shortlist(predicted, plain, 1)[0]


def test_many_drafts_pay_where_they_are_accepted_and_cheap() -> None:
    """Eight steps of 0.1 ms are hidden in a pass of 20 ms, and nearly all of their drafts are accepted."""
    assert best_pair(planted(acceptance=0.97, step=0.05))[0] == 8


def test_few_drafts_pay_where_they_are_not_accepted() -> None:
    assert best_pair(planted(acceptance=0.2, step=0.05))[0] <= 2


def test_more_branches_pay_where_outcomes_are_spread() -> None:
    seen = planted(acceptance=0.8, hit_rate=0.9, step=0.05)
    for rank in range(N):
        seen.ranks[rank] = 900 // N
    assert best_pair(seen)[1] == 24


def test_predicted_speed_is_near_the_closed_formula() -> None:
    """Drafts that cost nothing and always hit: 1 + a + a^2 tokens a pass of three."""
    seen = planted(acceptance=0.5, hit_rate=1.0, step=0.01)
    worlds = {0.0: prediction.world_of(seen, seen, N, 8).replace(jitter=0.0)}
    found = prediction.predict(worlds, (1, 0.0), 2, 24)
    assert found == pytest.approx(1.75 / pass_seconds(3), rel=0.1)


def test_priors_are_the_measured_world() -> None:
    seen = planted(acceptance=0.8)
    worlds = [prediction.world_of(seen, seen, N, 8)]
    priors = prediction.priors_of(worlds)
    assert priors.target_seconds(10) == pytest.approx(pass_seconds(10), rel=0.05)
    assert priors.acceptance == pytest.approx([0.8] * 8, abs=0.01)
    assert priors.hit_rate(12) == pytest.approx(seen.hit_rate(12), abs=0.01)
    assert sum(priors.draft_step) > 0


def test_priors_of_two_temperatures_are_between_them() -> None:
    worlds = [prediction.world_of(seen, seen, N, 4) for seen in (planted(0.9), planted(0.5))]
    assert prediction.priors_of(worlds).acceptance == pytest.approx([0.7] * 4, abs=0.01)
