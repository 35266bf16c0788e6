from __future__ import annotations

import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting import nodes
from scripts.faulting.nodes import Cluster, ClusterError
from scripts.soaking.processes import is_alive

COMES_UP = """#!/bin/bash
case "$*" in
  *--head*) (exec -a ray::IDLE sleep 60) & ;;
  *) (exec -a ray::DraftActor.serve sleep 60) & (setsid bash -c 'exec -a ray::DashboardAgent sleep 60') & ;;
esac
sleep 0.2
echo "Ray runtime started. $*"
wait
"""
FAILS = """#!/bin/bash
case "$*" in
  *--head*) echo "Ray runtime started."; sleep 60 ;;
  *) echo "no room here"; exit 1 ;;
esac
"""


@pytest.fixture
def instead_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What `ray start` is, from now on."""

    def replace(program: str) -> None:
        path = tmp_path / "python"
        path.write_text(program)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(nodes.sys, "executable", str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return replace


@pytest.fixture
def cluster(instead_of_ray: Callable[[str], None]) -> Iterator[Cluster]:
    instead_of_ray(COMES_UP)
    made = Cluster()
    yield made
    made.close()


def test_the_draft_is_found_on_the_second_node(cluster: Cluster) -> None:
    (draft,) = cluster.drafts()
    node = cluster.node_of(draft)
    assert node is not None
    assert node.address == "127.0.0.2"
    assert cluster.actors() == 1
    assert cluster.node_of(1) is None


def test_nothing_of_a_node_that_is_lost_goes_on_and_another_one_can_join(cluster: Cluster) -> None:
    (draft,) = cluster.drafts()
    node = cluster.node_of(draft)
    assert node is not None
    members = node.members()
    assert len(members) == 3, "itself, the actor, and one that has left the session"
    assert cluster.lose(node) == 3
    assert not any(map(is_alive, members))
    assert cluster.drafts() == []
    cluster.join()
    (again,) = cluster.drafts()
    joined = cluster.node_of(again)
    assert joined is not None
    assert joined.address == "127.0.0.3"


def test_nothing_of_a_cluster_that_is_closed_is_left(cluster: Cluster, tmp_path: Path) -> None:
    members = [pid for node in cluster._nodes for pid in node.members()]
    assert len(members) >= 5
    assert list(tmp_path.glob("saguaro-faults-*"))
    cluster.close()
    assert not any(map(is_alive, members))
    assert not list(tmp_path.glob("saguaro-faults-*"))


def test_a_node_that_does_not_come_up_says_why_and_the_others_are_ended(
    instead_of_ray: Callable[[str], None], tmp_path: Path
) -> None:
    instead_of_ray(FAILS)
    with pytest.raises(ClusterError, match=r"127\.0\.0\.2 did not come up\n--- end of its log\nno room here"):
        Cluster()
    assert not list(tmp_path.glob("saguaro-faults-*"))
