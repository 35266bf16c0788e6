"""Real engines with the draft in a Ray actor: beside the target, on another node, and where vLLM itself is in Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import plans
from tests.e2e.conftest import Plain
from tests.e2e.harness import (
    BASE,
    ROOT,
    EngineRun,
    Scenario,
    assert_same_texts,
    engines,
    is_gone_within,
    prompts,
    run_engines,
    saguaro,
)
from tests.e2e.ray_nodes import ray_environment, ray_nodes
from tests.e2e.shared_names import names_in_shared_memory

pytest.importorskip("ray")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCENARIO = plans.greedy(8, count=8)
NAME = SCENARIO["name"]


def expected(plain: Plain) -> Scenario:
    """What plain vLLM gave; its engine had more requests than these."""
    return plain.default[NAME].first(len(SCENARIO["prompts"]))


def folders() -> set[Path]:
    """What Rays of our own leave in the folder for temporary files."""
    return set(Path(tempfile.gettempdir()).glob("saguaro-ray-*"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, which differ in what they have."""
    with ray_nodes({"num_cpus": 2, "resources": {"head": 1}}, {"num_cpus": 1, "resources": {"far": 1}}) as made:
        yield made


FAULTS = ("kill_draft", "stop_draft")
CARE = {"first_back_off": 0.2, "longest_back_off": 0.4, "good_life": 0.5, "hang": 2.0, "longest_hang": 2.0}


@pytest.fixture(scope="module")
def local() -> EngineRun:
    """An engine with a Ray of its own. The actor is killed, and then hangs, before the first step of a scenario."""
    before = folders()
    faults = [plans.with_events(fault, (0, fault), (12, "await_draft")) for fault in FAULTS]
    spec = {"options": BASE | saguaro(placement="ray"), "scenarios": [SCENARIO, *faults], "care": CARE}
    with names_in_shared_memory() as names, engines([spec]) as group:
        run = group.read_engine()
        assert group.process.wait(60) == 0
        assert all(is_gone_within(pid, 5) for pid in run.answer["draft_pids"])
    # A Ray of our own leaves nothing.
    assert folders() <= before
    assert names.left() == set()
    return run


def test_the_text_is_the_plain_one(local: EngineRun, plain: Plain) -> None:
    assert_same_texts(local[NAME], expected(plain))
    assert local[NAME].hits > 0
    assert local.log_lines("draft runs in Ray", "this node", "shared memory")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_actor_that_ends_or_hangs_costs_no_request_and_another_one_is_started(
    local: EngineRun, plain: Plain, fault: str
) -> None:
    assert_same_texts(local[fault], plain.default["eight at once"])
    assert local[fault].metrics["vllm:saguaro_draft_restarts"] == 1


@pytest.mark.long
def test_killing_the_engine_ends_the_actor_and_ray() -> None:
    before = folders()
    with engines([{"options": BASE | saguaro(placement="ray"), "scenarios": [], "end": "wait"}]) as group:
        run = group.read_engine()
        group.process.kill()
        assert is_gone_within(run.answer["draft_pid"], 20)
        deadline = time.monotonic() + 20
        while not folders() <= before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert folders() <= before


def test_a_draft_on_another_node_gives_the_plain_text_over_the_network(cluster: Any, plain: Plain) -> None:
    options = {"address": cluster.address, "resources": {"far": 1}}
    spec = {"options": BASE | saguaro(placement="ray", ray_options=options), "scenarios": [SCENARIO]}
    (run,) = run_engines([spec])
    assert_same_texts(run[NAME], expected(plain))
    assert run[NAME].hits > 0
    assert run.log_lines("draft runs in Ray", "another node", "network")


@pytest.mark.long
def test_where_vllm_itself_is_in_ray_its_cluster_is_used(cluster: Any, plain: Plain) -> None:
    spec = {
        "options": BASE | saguaro(placement="ray"),
        "prompts": list(prompts()[:8]),
        "params": {"max_tokens": plans.TOKENS, "ignore_eos": True},
    }
    before = folders()
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.in_ray", cluster.address],
        cwd=ROOT,
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        timeout=600,
        env=ray_environment(),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer = json.loads(done.stdout)
    assert answer["tokens"] == expected(plain).tokens
    assert answer["hits"] > 0
    assert answer["groups"] == [], "what was asked for the draft is given back, and the cluster goes on"
    assert folders() <= before, "no Ray of our own was started"
