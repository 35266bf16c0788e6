"""Two real engines, in processes of their own, with one draft between them in a Ray cluster."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import plans
from tests.e2e.harness import (
    BASE,
    EngineRun,
    Json,
    assert_same_texts,
    engines,
    is_alive,
    is_gone_within,
    run_engines,
    saguaro,
)
from tests.e2e.ray_nodes import ray_environment, ray_nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

SCENARIO = plans.greedy(8, count=8)
NAME = SCENARIO["name"]
CARE = {"first_back_off": 0.2, "longest_back_off": 0.4, "good_life": 0.5, "hang": 20.0, "longest_hang": 20.0}
LINGERS_SECONDS = 30


@dataclass(frozen=True)
class Shared:
    """What the two engines gave, of which the first was killed when both had gone through their first scenario."""

    killed: EngineRun
    left: EngineRun
    pools: list[int]
    pool_lived_on: bool
    cpus_after: float


@pytest.fixture(scope="module")
def plain() -> EngineRun:
    return run_engines([{"options": BASE, "scenarios": [SCENARIO, plans.with_events("eight at once")]}])[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One node, with one core to give away."""
    with ray_nodes({"num_cpus": 1}) as made:
        yield made


def free_cpus(address: str) -> float:
    """As another driver sees the cluster."""
    code = f"import ray; ray.init({address!r}, logging_level='ERROR'); print(ray.available_resources().get('CPU', 0.0))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=ray_environment(), check=True)
    return float(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shared(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    sign = tmp_path_factory.mktemp("sign") / "go on"
    pool = {"placement": "ray", "draft_pool": "test", "ray_options": {"address": cluster.address}}
    options = BASE | saguaro(**pool)
    after = plans.with_events("after", (0, "await_sign"))
    again = plans.with_events("pool killed", (0, "kill_draft"), (12, "await_draft"))
    first: Json = {"options": options, "scenarios": [SCENARIO], "end": "wait"}
    second: Json = {"options": options, "scenarios": [SCENARIO, after, again], "care": CARE, "sign": str(sign)}
    with engines([first]) as one, engines([second]) as other:
        killed = one.read_engine()
        one.process.kill()
        one.process.wait()
        time.sleep(1)
        lived_on = is_alive(killed.answer["draft_pid"])
        Path(sign).touch()
        left = other.read_engine()
        assert other.process.wait(60) == 0
        pools = [killed.answer["draft_pid"], *left.answer["draft_pids"]]
        assert all(is_gone_within(pid, LINGERS_SECONDS + 30) for pid in pools)
        return Shared(killed, left, pools, lived_on, free_cpus(cluster.address))


def test_both_have_the_plain_text_and_hits(shared: Shared, plain: EngineRun) -> None:
    for run in (shared.killed, shared.left):
        assert_same_texts(run[NAME], plain[NAME])
        assert run[NAME].hits > 0


def test_they_have_one_draft_between_them(shared: Shared) -> None:
    assert shared.pools[0] == shared.pools[1]
    assert len(set(shared.pools)) == 2, "and then another one, after that was killed"
    for run in (shared.killed, shared.left):
        assert run.log_lines('draft pool "test" runs in Ray on this node', "shared memory")


def test_the_other_goes_on_when_one_is_killed(shared: Shared, plain: EngineRun) -> None:
    assert shared.pool_lived_on
    assert_same_texts(shared.left["after"], plain["eight at once"])
    assert shared.left["after"].hits > 0
    assert shared.left["after"].metrics["vllm:saguaro_draft_restarts"] == 0


def test_a_pool_that_is_killed_is_started_again(shared: Shared, plain: EngineRun) -> None:
    found = shared.left["pool killed"]
    assert_same_texts(found, plain["eight at once"])
    assert found.hits > 0
    assert found.metrics["vllm:saguaro_draft_restarts"] == 1


def test_nothing_is_left_of_it_in_the_cluster(shared: Shared) -> None:
    assert shared.cpus_after == 1.0
