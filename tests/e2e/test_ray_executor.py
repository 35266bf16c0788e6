"""vLLM's workers in Ray (`distributed_executor_backend` "ray"), and the draft beside them.

vLLM 0.32 has no Ray executor for a CPU. What it lacks is a name: that of the resource by which Ray counts workers. So
the engines here run on a platform that is vLLM's for the CPU and has one, brought in by vLLM's own door for platforms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import plans
from tests.e2e.harness import BASE, ROOT, EngineRun, assert_same_texts, engines, is_gone_within, run_engines, saguaro
from tests.e2e.ray_nodes import ray_nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]  # the refusal is what a user meets

SCENARIO = plans.greedy(8, count=8)
NAME = SCENARIO["name"]
RESOURCE = "NPU"
"""Which Ray counts one by one, as it does GPUs, and of which it finds none here by itself."""
PLATFORM = f'''
from vllm.platforms.cpu import CpuPlatform


class CpuInRay(CpuPlatform):
    ray_device_key = "{RESOURCE}"


def platform() -> str:
    return "cpu_in_ray.CpuInRay"
'''


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where Python finds the platform, and vLLM its entry point."""
    folder: Path = tmp_path_factory.mktemp("platform")
    (folder / "cpu_in_ray.py").write_text(PLATFORM)
    about = folder / "cpu_in_ray-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-in-ray\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\ncpu_in_ray = cpu_in_ray:platform\n")
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture(scope="module")
def cluster(path: str) -> Iterator[Any]:
    with ray_nodes({"num_cpus": 2, "resources": {RESOURCE: 4}}, path=path) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> EngineRun:
    """vLLM's own way, and no Ray."""
    return run_engines([{"options": BASE, "scenarios": [SCENARIO]}])[0]


@pytest.mark.parametrize("placement", ["process", "ray"])
def test_workers_in_ray_have_a_draft(placement: str, cluster: Any, path: str, plain: EngineRun) -> None:
    # Not adaptive: on a busy machine the draft may be so late that all is left to the target.
    options = BASE | {"distributed_executor_backend": "ray"} | saguaro(placement=placement, adaptive=False)
    spec = {"options": options, "scenarios": [SCENARIO]}
    with engines([spec], RAY_ADDRESS=cluster.address, PYTHONPATH=path, RAY_USAGE_STATS_ENABLED="0") as group:
        run = group.read_engine()
        assert group.process.wait(60) == 0, group.whole_log()[-6000:]
    assert_same_texts(run[NAME], plain[NAME])
    assert run[NAME].hits > 0
    (worker,), (draft,) = run.answer["rank_pids"], run.answer["drafts_of_ranks"]
    assert worker != run.answer["pid"], "the worker is an actor's process"
    assert all(is_gone_within(pid, 20) for pid in (worker, draft))
