"""Where the formulas of `algorithm/timing.py` hold the event model agrees with them; it has what they leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from vllm_saguaro.algorithm import timing
from vllm_saguaro.algorithm.timing import DraftTimes
from vllm_saguaro.config import AUTO_MAX_BRANCHES
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE
from vllm_saguaro.drafting.pace import CHOICES
from vllm_saguaro.simulation import simulation
from vllm_saguaro.simulation.draft_side import DraftSide
from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.result import Result
from vllm_saguaro.simulation.simulation import branches_that_pay, simulate
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError, reach_of

ACCEPTANCE, HIT = 0.8, 0.75
WORLD = World(
    name="units of a verify pass",
    target_pass=PassTime.linear(1.0),
    draft_pass=PassTime.linear(0.15),
    reach=reach_of(ACCEPTANCE, 8),
    hits=HitCurve.constant(HIT),
)
PLAN = Plan("ours", k=4, branches=12, requests=4, tokens=2000)
CHANCE = 0.04
"""Relative: what is left to chance in a run of about 4000 rounds."""


def run(engine: str, world: World = WORLD, **changes: Any) -> Result:
    return simulate(world, PLAN.replace(engine=engine, **changes))


def tokens(k: int, acceptance: float = ACCEPTANCE) -> float:
    return timing.expected_tokens([acceptance] * k)


# The limits


def test_plain_decoding_gives_a_token_a_pass() -> None:
    result = run("plain", tokens=500)
    assert result.tokens_per_second == pytest.approx(1.0)
    assert result.tokens_per_round == 1.0
    assert result.tokens == 4 * 500


@pytest.mark.parametrize(("k", "step"), [(1, 0.5), (4, 0.15), (8, 0.4)])
def test_sd_is_the_formula_of_plain_speculation(k: int, step: float) -> None:
    found = run("sd", WORLD.replace(draft_pass=PassTime.linear(step)), k=k)
    assert found.tokens_per_second == pytest.approx(
        timing.speed_up_of_plain_speculation(tokens(k), k * step), rel=CHANCE
    )


@pytest.mark.parametrize("hit_rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("backup", ["jit", "none"])
def test_ssd_is_theorem_7_where_the_table_is_there_in_time(hit_rate: float, backup: str) -> None:
    found = run("ssd", WORLD.replace(hits=HitCurve.constant(hit_rate)), backup=backup)
    drafted = backup == "jit"
    expected = timing.speed_up_over_plain(
        hit_rate, tokens(4), tokens(4) if drafted else 1.0, primary=5 * 0.15, backup=4 * 0.15 if drafted else 0.0
    )
    assert found.tokens_per_second == pytest.approx(expected, rel=CHANCE)
    assert found.hit_rate == pytest.approx(hit_rate, abs=CHANCE)


@pytest.mark.parametrize("step", [0.1, 0.5])
@pytest.mark.parametrize("k", [2, 6])
def test_ssd_without_backups_is_the_rate_of_a_target_that_waits(step: float, k: int) -> None:
    world = WORLD.replace(draft_pass=PassTime.linear(step), service=0.05, fork=0.1)
    expected = timing.rate_when_waiting(
        k, lambda _: 1.05, DraftTimes(0.1 + step, step), 12, WORLD.reach, service=0.05, hit_rate=HIT
    )
    assert run("ssd", world, k=k, backup="none").tokens_per_second == pytest.approx(expected, rel=CHANCE)


def test_ours_is_theorem_7_without_backups_where_the_table_is_there_in_time() -> None:
    expected = timing.speed_up_over_plain(HIT, tokens(4), 1.0, primary=0.75, backup=0.0)
    found = run("ours")
    assert found.tokens_per_second == pytest.approx(expected, rel=CHANCE)
    assert found.late == found.missed_late == 0
    assert found.waited == 0


@pytest.mark.parametrize("step", [0.3141, 0.4321, 0.2345])
def test_ours_takes_the_depths_that_are_there_and_does_not_wait(step: float) -> None:
    """A forward is never broken off: the round of outcome n begins at the first end of one that is not before it."""
    found = run("ours", WORLD.replace(draft_pass=PassTime.linear(step)), k=8, rests=False)
    begins = [step * math.ceil(n / step) for n in range(1, 2000)]
    depths = [math.floor((n + 1 - began) / step) - 1 for n, began in enumerate(begins, start=1)]
    expected = sum(HIT * tokens(depth) + 1 - HIT if depth > 0 else 1.0 for depth in depths) / len(depths)
    assert found.tokens_per_round == pytest.approx(expected, rel=CHANCE)
    assert found.step_seconds == pytest.approx(1.0)
    assert found.late_share > 0.99


@pytest.mark.parametrize("step", [0.3141, 0.4321, 0.2345])
def test_a_draft_that_rests_has_the_depths_that_are_in_time(step: float) -> None:
    world, depth = WORLD.replace(draft_pass=PassTime.linear(step)), math.floor((1 - step) / step)
    found = run("ours", world, k=8)
    assert found.tokens_per_round == pytest.approx(HIT * tokens(depth) + 1 - HIT, rel=CHANCE)
    assert found.tokens_per_round > run("ours", world, k=8, rests=False).tokens_per_round
    assert found.late_share > 0.99
    assert found.missed_late == 0


def test_a_draft_that_rests_goes_on_where_the_pass_takes_much_longer_than_usual() -> None:
    """Of two steps that fit into a usual pass, and a third one that does not, but into one of twice the time."""
    events: list[tuple[float, Callable[[], None]]] = []
    done: list[tuple[int, float]] = []
    now = 0.0

    def schedule(seconds: float, action: Callable[[], None]) -> None:
        events.append((now + seconds, action))

    def publish(side: DraftSide, number: int, depth: int) -> None:
        done.append((depth, round(now, 6)))

    side = DraftSide(WORLD.replace(draft_pass=PassTime.linear(0.3)), 4, lambda: now, schedule, publish)
    side.begin(1, 1, 1, 1.0, expected=1.0)
    while events:
        ((now, action),) = events
        events.clear()
        action()
    assert done == [(1, 0.6), (2, 0.9), (3, 1.25 + 0.3), (4, 1.25 + 0.6)]


def test_the_ideal_is_reached_where_every_outcome_is_a_hit() -> None:
    world = WORLD.replace(hits=HitCurve.constant(1.0), draft_pass=PassTime.linear(0.2))
    ratio = run("ssd", world).tokens_per_second / run("sd", world).tokens_per_second
    assert ratio == pytest.approx(timing.ideal_ratio(0.8), rel=CHANCE)


# What the formulas leave out


def test_in_a_batch_one_miss_stalls_the_papers_engine() -> None:
    """Corollary 16: p becomes p^b in the time and stays p in the tokens (tables in time, JIT of one row as of many)."""
    batch, drafting = 8, 0.6
    found = run("ssd", batch=batch, requests=16, tokens=1500)
    all_hit = HIT**batch
    expected = batch * tokens(4) / (all_hit + (1 - all_hit) * (1 + drafting))
    assert found.tokens_per_second == pytest.approx(expected, rel=CHANCE)


@pytest.mark.parametrize("engine", ["ssd", "ours"])
def test_latency_costs_nothing_while_it_fits_under_the_pass_of_ours(engine: str) -> None:
    near, far = run(engine), run(engine, WORLD.replace(latency=0.1))
    if engine == "ours":
        assert far.tokens_per_second == pytest.approx(near.tokens_per_second, rel=CHANCE)
    else:
        assert far.step_seconds == pytest.approx(near.step_seconds + 0.2, rel=CHANCE), "there and back, each round"


def test_with_a_latency_as_long_as_a_pass_nothing_is_in_time() -> None:
    found = run("ours", WORLD.replace(latency=1.0), tokens=500)
    assert found.hits <= 2 * 4, "the first table of a request is there before it begins"
    assert found.missed_late > 0
    assert found.tokens_per_second == pytest.approx(1.0, rel=CHANCE)


def test_more_drafts_share_the_rows_of_a_batch() -> None:
    world = WORLD.replace(draft_pass=PassTime.linear(0.05, 0.001))
    one, four = (run("ours", world, drafts=drafts, batch=32, requests=64, tokens=300) for drafts in (1, 4))
    assert one.late_share > 0.9 > 0.1 > four.late_share
    assert four.tokens_per_second > 1.2 * one.tokens_per_second


def test_a_full_forward_cuts_the_branches() -> None:
    curve = HitCurve(((1, 0.3), (12, 0.9)))
    found = run("ours", WORLD.replace(hits=curve), batch=64, requests=128, tokens=200)
    assert found.hit_rate == pytest.approx(curve.at(4), abs=0.02), "256 rows for 64 requests"
    assert run("ours", WORLD.replace(hits=curve), batch=64, requests=128, tokens=200, most_rows=0).hit_rate > 0.85


def test_where_more_drafts_do_not_pay_fewer_are_verified() -> None:
    dear = WORLD.replace(target_pass=PassTime.linear(0.0, 1.0))
    always, adapted = run("ours", dear, tokens=500), run("ours", dear, tokens=500, adaptive=True)
    assert adapted.verified == 0 < always.verified
    assert adapted.tokens_per_second > always.tokens_per_second


def test_guesses_are_for_missed_outcomes() -> None:
    world = WORLD.replace(hits=HitCurve.constant(0.0), guessed=0.5, guess_reach=(0.6, 0.3))
    assert run("ours", world).tokens_per_round == pytest.approx(1 + 0.5 * 0.9, rel=CHANCE)


def test_waves_have_a_tail_that_continuous_batching_has_not() -> None:
    waves, steady = (run("ours", waves=waves, batch=8, requests=64, tokens=60) for waves in (True, False))
    assert waves.tokens == steady.tokens == 64 * 60
    assert waves.passes > steady.passes


def test_jitter_makes_some_tables_late_and_leaves_the_mean() -> None:
    world = WORLD.replace(draft_pass=PassTime.linear(0.19), jitter=0.1)
    found = run("ours", world)
    assert 0.1 < found.late_share < 0.9
    assert found.step_seconds == pytest.approx(1.0, rel=CHANCE)


def test_a_run_is_the_same_each_time_and_another_with_another_seed() -> None:
    assert run("ours", tokens=200) == run("ours", tokens=200)
    assert run("ours", tokens=200, seed=1) != run("ours", tokens=200)


def test_thousands_of_requests_all_end() -> None:
    found = run("ours", batch=1000, requests=4000, tokens=40, drafts=8)
    assert found.tokens == 4000 * 40
    assert found.request_seconds > 0


# Choices and refusals


def test_n_is_chosen_by_the_draft_sides_own_rule() -> None:
    world = WORLD.replace(hits=HitCurve(((12, 0.9),)), draft_pass=PassTime.linear(0.1, 0.002))
    plan = PLAN.replace(branches=0)
    available = 0.95 * world.target_pass.at(1)
    hits = {n: world.hits.at(n) for n in CHOICES if n <= AUTO_MAX_BRANCHES}
    expected = timing.best_branches(DraftTimes(0.102, 0.1, 0.002), available, 1, 4, world.reach[:4], hits, list(hits))
    assert branches_that_pay(world, plan) == expected
    assert run("ours", world, branches=0, tokens=50).branches == expected
    assert simulation._AUTO_MOST == AUTO_MAX_BRANCHES
    assert PLAN.most_rows == MAX_ROWS_A_TREE


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "magic"},
        {"backup": "ngram"},
        {"k": 0},
        {"batch": 0},
        {"requests": 0},
        {"tokens": 0},
        {"drafts": 0},
        {"branches": -1},
        {"most_rows": -1},
        {"k": 9},
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(WorldError) as caught:
        simulate(WORLD, PLAN.replace(**changes))
    assert "write" in str(caught.value)


def test_a_target_that_takes_no_time_is_refused() -> None:
    with pytest.raises(WorldError, match="some time"):
        simulate(WORLD.replace(target_pass=PassTime.linear(0.0)), PLAN)
