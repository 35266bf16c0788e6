from __future__ import annotations

from pathlib import Path

import pytest

from vllm_saguaro.algorithm.timing import ideal_ratio
from vllm_saguaro.simulation import comparison
from vllm_saguaro.simulation.comparison import SWEEPS, best_k, compare, sweep, tokens_of
from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.plots import plot_sweeps
from vllm_saguaro.simulation.simulation import simulate
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError, reach_of

WORLD = World(
    name="small",
    target_pass=PassTime.linear(1.0),
    draft_pass=PassTime.linear(0.2),
    reach=reach_of(0.7, 8),
    hits=HitCurve.constant(0.8),
)
PLAN = Plan("ours", branches=12, requests=4, tokens=100)


def test_the_four_engines_are_compared_with_ar_and_with_sd() -> None:
    plain, sd, ssd, ours = compare(WORLD, PLAN, 4)
    assert [found.result.engine for found in (plain, sd, ssd, ours)] == ["plain", "sd", "ssd", "ours"]
    assert plain.over_plain == sd.over_sd == 1.0
    assert [found.result.branches for found in compare(WORLD, PLAN.replace(branches=0), 4, ["ssd"])] == [0, 0, 24]
    assert plain.share_of_ideal is None
    assert sd.share_of_ideal is None
    assert ours.over_plain == pytest.approx(ours.result.tokens_per_second / plain.result.tokens_per_second)
    assert ssd.share_of_ideal == pytest.approx(ssd.over_sd / ideal_ratio(WORLD.cost_ratio(4)))


def test_an_engine_alone_still_has_what_it_is_compared_with() -> None:
    assert [found.result.engine for found in compare(WORLD, PLAN, 2, ["ours"])] == ["plain", "sd", "ours"]


def test_tokens_of_a_round_are_the_sum_of_its_reach() -> None:
    assert tokens_of(WORLD, 3) == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    assert tokens_of(WORLD.replace(reach=(0.0, 0.0)), 2) == 1.0


def test_the_best_k_of_sd_is_the_best_one_simulated() -> None:
    plan = PLAN.replace(engine="sd", tokens=3000)
    speeds = {k: simulate(WORLD, plan.replace(k=k)).tokens_per_second for k in range(1, 9)}
    assert speeds[best_k(WORLD, plan)] > 0.98 * max(speeds.values())


def test_the_best_k_of_a_waiting_engine_fits_under_the_pass() -> None:
    assert best_k(WORLD, PLAN.replace(engine="ssd")) == 4, "a glue forward and four more in one pass"
    assert best_k(WORLD, PLAN) == 3, "ours keeps a twentieth of the pass free"
    assert best_k(WORLD.replace(draft_pass=PassTime.linear(0.02)), PLAN.replace(engine="ssd")) == 8
    assert best_k(WORLD, PLAN.replace(engine="plain")) == 1


def test_messages_of_a_target_that_asks_give_the_draft_time_and_those_of_ours_take_it() -> None:
    world = WORLD.replace(latency=0.1)
    assert best_k(world, PLAN.replace(engine="ssd")) == 5
    assert best_k(world, PLAN) == 2


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_runs_over_all_of_its_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_some(world: World, plan: Plan, k: int | None, engines: object) -> list[comparison.Compared]:
        result = simulate(world, plan.replace(engine="plain", requests=1, tokens=1))
        return [comparison.Compared(result, 1.0, 1.0, None)]

    monkeypatch.setattr(comparison, "compare", only_some)
    assert [found.value for found in sweep(WORLD, PLAN, None, name)] == list(SWEEPS[name].values)


def test_a_sweep_changes_what_it_says() -> None:
    def at(name: str, value: float) -> tuple[World, Plan, int | None]:
        return SWEEPS[name].at(WORLD, PLAN, 4, value)

    assert at("cost-ratio", 0.5)[0].cost_ratio(4) == pytest.approx(0.5)
    assert at("hit-rate", 0.3)[0].hits.at(12) == 0.3
    assert at("batch", 8)[1].batch == 8
    assert at("batch", 8)[1].requests == 32
    assert at("k", 100)[2] == 8
    assert at("branches", 24)[1].branches == 24
    assert (at("drafts", 4)[1].drafts, at("drafts", 4)[1].batch) == (4, 32)
    assert at("latency", 3)[0].latency == 0.003
    assert (at("requests", 4)[1].batch, at("requests", 4)[1].requests) == (4000, 8000)


def test_an_unknown_sweep_is_refused() -> None:
    with pytest.raises(WorldError, match="cost-ratio"):
        list(sweep(WORLD, PLAN, None, "weather"))


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [
        comparison.Compared(one.result, one.over_plain, one.over_sd, one.share_of_ideal, value)
        for value in (1.0, 2.0)
        for one in compare(WORLD, PLAN.replace(tokens=5), 2)
    ]
    path = tmp_path / "folder" / "sweep.png"
    plot_sweeps({"batch": found, "k": found}, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")
