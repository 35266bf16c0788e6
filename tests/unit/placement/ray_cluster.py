"""A Ray cluster of two nodes on this machine, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def environment() -> dict[str, str]:
    """This process's, without what it has of another Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def two_nodes(head_cpus: int) -> Iterator[Any]:
    """The first has `head_cpus` cores to give away; the second one core, and the resource `far`."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(environment())  # the nodes start with this one's
    head = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=80 << 20)
    yield made
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)


def in_cluster(cluster: Any, ask: str) -> Any:
    """What another driver sees of the cluster."""
    code = (
        "import json, ray, sys\nfrom ray.util import placement_group_table\n"
        f"ray.init({cluster.address!r}, logging_level='ERROR', log_to_driver=False)\n"
        f"print('answer', json.dumps({ask}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    return json.loads(run.stdout.rpartition("answer")[2])


def groups_left(cluster: Any) -> list[str]:
    states = in_cluster(cluster, "[group['state'] for group in placement_group_table().values()]")
    return [state for state in states if state != "REMOVED"]


def free_cpus(cluster: Any) -> float:
    return float(in_cluster(cluster, "ray.available_resources().get('CPU', 0)"))


@contextlib.contextmanager
def another_target(module: str, channel: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A target in a process of its own, with a draft that is ready: `channel`, said in the names of a module here.

    Gives its process, the actor's process id and the folder of its own Ray ("None" where it has none).
    """
    code = (
        f"import time; from tests.unit.placement.{module} import *\nwith {channel} as channel:\n"
        "    channel.wait_until_ready(); print(channel.pid, channel._folder, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        pid, folder = target.stdout.readline().split()
        try:
            yield target, int(pid), folder
        finally:
            target.kill()
