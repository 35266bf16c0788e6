"""Ray nodes on this machine, for engines that have their draft in a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from tests.e2e.harness import ROOT, Json, environment_at_start


def ray_environment() -> dict[str, str]:
    """What this process was started with; Ray says nothing of itself to anybody."""
    return {**environment_at_start(), "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def ray_nodes(head: Json, *others: Json, path: str = str(ROOT)) -> Iterator[Any]:
    """A cluster of a head and other nodes, each with what it has to give away.

    They start with `ray_environment`, and Python looks in `path` there.
    """
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**ray_environment(), "PYTHONPATH": path})
    store = {"object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head, **store})
    for node in others:
        made.add_node(**node, **store)
    yield made
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)
