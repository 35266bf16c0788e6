from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_saguaro.simulation.published import LLAMA_70B, WORLDS
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError, reach_of


def test_pass_times_are_straight_between_points_and_beyond() -> None:
    times = PassTime(((1, 1.0), (3, 2.0), (5, 6.0)))
    assert [times.at(size) for size in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 4.0, 8.0]
    assert PassTime(((4, 1.0), (5, 3.0))).at(1) == 0.0, "no pass takes less than no time"
    assert PassTime(((4, 1.5),)).at(100) == 1.5
    assert PassTime.linear(2.0, 0.5).line(4, 8) == (2.0, 0.5)
    assert PassTime.linear(2.0, 0.5).times(2).at(4) == 8.0


def test_one_hit_rate_goes_on_as_a_power_and_two_give_the_power() -> None:
    curve = HitCurve(((10, 0.9),))
    assert curve.at(10) == pytest.approx(0.9)
    assert 1 - curve.at(100) == pytest.approx(0.1 * 10**-0.87)
    two = HitCurve(((1, 0.5), (4, 0.75)))
    assert two.at(2) == pytest.approx(1 - 0.5 / 2**0.5)
    assert two.at(16) == pytest.approx(1 - 0.125)
    assert [HitCurve.constant(rate).at(n) for rate in (0.0, 0.7, 1.0) for n in (1, 50)] == [0, 0, 0.7, 0.7, 1, 1]


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_a_world_survives_json(world: World, tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    path.write_text(json.dumps(world.to_json()))
    assert World.read(path) == world


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reach": [0.5, 0.6]}, "P\\(at least j accepted\\)"),
        ({"latency": -1.0}, "latency"),
        ({"target_pass": []}, "pass times"),
        ({"target_pass": [[2, 1], [1, 1]]}, "growing size"),
        ({"target_pass": [[1, -1]]}, "seconds"),
        ({"hits": [[0, 0.5]]}, "growing N"),
        ({"hits": [[1, 1.5]]}, "between 0 and 1"),
        ({"guessed": 2.0}, "share"),
        ({"fork": "x"}, "numbers"),
        ({"unheard_of": 1}, "unknown key"),
    ],
)
def test_a_world_that_cannot_be_is_refused_with_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(WorldError, match=says) as caught:
        World.from_json({**LLAMA_70B.to_json(), **changes})
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_world_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    for text, says in (("", "JSON"), ("[]", "no object"), ('{"name": "x"}', "is missing")):
        path.write_text(text)
        with pytest.raises(WorldError, match=says):
            World.read(path)


def test_the_cost_ratio_is_drafting_over_verifying_on_one_device() -> None:
    world = LLAMA_70B.replace(
        target_pass=PassTime.linear(10.0), draft_pass=PassTime.linear(1.0), serial_factor=2.0, serial_overhead=1.0
    )
    assert world.serial_drafting(4) == 10.0
    assert world.cost_ratio(4) == 0.5


def test_reach_falls_as_powers() -> None:
    assert reach_of(0.5, 3) == (0.5, 0.25, 0.125)
