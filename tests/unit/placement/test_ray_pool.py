"""A draft pool in a real Ray cluster, with the fake model: who starts it, who joins it, and when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.placement.far_draft import MAX_LENGTH, SHAPE, VOCABULARY
from tests.unit.placement.ray_cluster import ROOT, another_target, environment, free_cpus, in_cluster, two_nodes
from tests.unit.placement.test_far_draft import admit, table_of
from tests.unit.placement.test_ray_channel import MODULE, check_that_it_drafts, needs_ray
from tests.unit.placement.watching import gone, until
from vllm_saguaro.messages import Stamp
from vllm_saguaro.placement import ray_channel
from vllm_saguaro.placement.channel import DraftFailed, NoRoom, NotAdmitted
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.ray_channel import RayChannel, RayDraft

pytestmark = [pytest.mark.slow, needs_ray]

LINGER = 4.0
"""Seconds. Nobody has to come within them: that may take longer on a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes(head_cpus=2) as made:
        yield made


def wanted(address: str, pool: str, slots: int = 3, engines: int = 3, **others: Any) -> RayDraft:
    options = {
        "model": {"model": "small", "vocab_size": VOCABULARY, "max_length": MAX_LENGTH},
        "branches": SHAPE.branches,
        "num_speculative_tokens": SHAPE.num_speculative_tokens,
        "draft_sample_method": "coupled",
        **others.pop("options", {}),
    }
    asked = {"num_cpus": 1, "address": address, "linger": LINGER, **others}
    cpus = sorted(os.sched_getaffinity(0))[-1:]
    return RayDraft(MODULE, options, cpus, pool=pool, engines=engines, slots=slots, **asked)


@contextlib.contextmanager
def opened(draft: RayDraft) -> Iterator[RayChannel]:
    with contextlib.closing(RayChannel(draft, SHAPE, environment())) as channel:
        yield channel


def named_actors(cluster: Any, namespace: str = "saguaro") -> list[str]:
    found = in_cluster(cluster, "ray.util.list_named_actors(all_namespaces=True)")
    return [one["name"] for one in found if one["namespace"] == namespace]


def test_engines_that_name_one_pool_share_a_draft_which_ends_a_while_after_them(cluster: Any) -> None:
    draft = wanted(cluster.address, "shared")
    with opened(draft) as first, opened(draft) as second:  # at once: Ray settles whose actor it is
        check_that_it_drafts(first)
        check_that_it_drafts(second)
        pool = first.pid
        assert second.pid == pool
        assert first.resident_bytes > 1 << 20
        assert named_actors(cluster) == ["saguaro-pool-shared"]
        first.close()
        time.sleep(LINGER + 1)
        assert second.post(admit(2))
        table_of(second, Stamp(1, 2, 0))
    assert until(lambda: gone(pool), LINGER + 15)
    assert until(lambda: named_actors(cluster) == [], 10)
    assert until(lambda: free_cpus(cluster) == 3.0)


def test_an_engine_that_comes_when_all_others_have_left_finds_the_draft_that_waits_a_while(cluster: Any) -> None:
    draft = wanted(cluster.address, "lingering", linger=120.0)  # far longer than an engine takes to come
    with opened(draft) as first:
        check_that_it_drafts(first)
        pool = first.pid
    with opened(draft) as second:
        check_that_it_drafts(second)
        assert second.pid == pool
    os.kill(pool, signal.SIGKILL)
    assert until(lambda: free_cpus(cluster) == 3.0)


def test_a_pool_outlives_the_engine_that_started_it_however_that_ends(cluster: Any) -> None:
    channel = f"opened(wanted({cluster.address!r}, 'orphan'))"
    with (
        another_target("test_ray_pool", channel) as (target, pool, _),
        opened(wanted(cluster.address, "orphan")) as other,
    ):
        check_that_it_drafts(other)
        assert other.pid == pool
        target.kill()
        target.wait()
        time.sleep(LINGER + 2)
        assert other.alive
        assert other.post(admit(2))
        table_of(other, Stamp(1, 2, 0))
    assert until(lambda: gone(pool), LINGER + 15)


def test_a_pool_that_was_killed_is_noticed_by_all_and_started_once_more(cluster: Any) -> None:
    draft = wanted(cluster.address, "killed")
    with opened(draft) as first, opened(draft) as second:
        check_that_it_drafts(first)
        check_that_it_drafts(second)
        before = first.pid
        os.kill(before, signal.SIGKILL)
        assert until(lambda: not (first.alive or second.alive))
    with opened(draft) as first, opened(draft) as second:
        check_that_it_drafts(first)
        check_that_it_drafts(second)
        assert first.pid == second.pid != before
        pool = first.pid
    assert until(lambda: gone(pool), LINGER + 15)


@pytest.mark.long  # a minute
def test_a_pool_that_does_not_answer_is_ended_and_followed(cluster: Any) -> None:
    draft = wanted(cluster.address, "stopped")
    with opened(draft) as first:
        check_that_it_drafts(first)
        before = first.pid
        os.kill(before, signal.SIGSTOP)
    with opened(draft) as second:
        check_that_it_drafts(second)
        assert second.pid != before
        pool = second.pid
    assert until(lambda: gone(before), 10)
    assert until(lambda: gone(pool), LINGER + 15)


def test_a_pool_without_room_is_waited_for_and_does_not_stay_when_nobody_waits_any_more(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_channel, "START_TIMEOUT_SECONDS", 60.0)  # else what fails here does so after 15 minutes
    draft = wanted(cluster.address, "roomless", resources={"far": 2})  # no node has so many
    with opened(draft) as first, opened(draft) as second:
        for channel in (first, second):
            channel.wait_for_room(0.0)
            with pytest.raises(NoRoom, match="no node has 2 far free"):
                channel.wait_until_ready()
        first.close()
        assert until(lambda: named_actors(cluster) == ["saguaro-pool-roomless"], 15), "the other one has asked anew"
        assert second.alive
        with pytest.raises(NoRoom):
            second.wait_until_ready()
    assert named_actors(cluster) == []


def test_an_engine_on_another_node_than_the_pool_talks_to_it_over_the_network(cluster: Any) -> None:
    with opened(wanted(cluster.address, "distant", resources={"far": 1}, namespace="ours")) as channel:
        check_that_it_drafts(channel)
        assert named_actors(cluster, "ours") == ["saguaro-pool-distant"]
        assert isinstance(channel._link, NetworkChannel)
        pool = channel.pid
    assert until(lambda: gone(pool), LINGER + 15)


@pytest.mark.parametrize(
    ("others", "said", "disagrees"),
    [
        ({"options": {"num_speculative_tokens": 2}}, "num_speculative_tokens 2 instead of 4", True),
        ({}, "room for 1 engines", False),
    ],
)
def test_one_that_is_refused_is_told_why_and_the_other_goes_on(
    cluster: Any, others: dict[str, Any], said: str, disagrees: bool
) -> None:
    name = "strict" if disagrees else "full"
    with opened(wanted(cluster.address, name, engines=1)) as first:
        check_that_it_drafts(first)
        with opened(wanted(cluster.address, name, **others)) as second:
            with pytest.raises(NotAdmitted, match=said) as found:
                second.wait_until_ready()
            assert found.value.disagrees == disagrees
            assert second.epoch(0) == 0
        assert first.post(admit(2))
        table_of(first, Stamp(1, 2, 0))
        pool = first.pid
    assert until(lambda: gone(pool), LINGER + 15)


def test_a_draft_that_cannot_load_is_told_to_all_that_wait_and_leaves_nothing(cluster: Any) -> None:
    draft = wanted(cluster.address, "broken", options={"role": "fails"})
    with opened(draft) as first, pytest.raises(DraftFailed, match="this draft cannot be loaded"):
        first.wait_until_ready()
    assert until(lambda: named_actors(cluster) == [], 15)


def test_a_slow_start_is_waited_for_by_all(cluster: Any) -> None:
    draft = wanted(cluster.address, "slow", options={"role": "slow"})
    with opened(draft) as first, opened(draft) as second:
        check_that_it_drafts(second)
        check_that_it_drafts(first)
        pool = first.pid
    assert until(lambda: gone(pool), LINGER + 15)


CROWD = """
import json, sys
import ray
from vllm_saguaro.placement import ray_pool_placer as placer

wanted = json.loads(sys.argv[1])
ray.init(wanted["address"], logging_level="ERROR", log_to_driver=False)
placer._SPARE_CALLS = 0
actor = placer._named(wanted)
ray.get(actor.whereabouts.options(concurrency_group=placer._DOOR).remote(), timeout=120)
waiting = [actor.draft_for.remote(placer._ask(wanted), {}) for _ in range(4)]
assert not ray.wait(waiting, timeout=2)[0]
class Parent:
    def check(self): pass
room = placer.Room(wanted, lambda **_: None)
print("answer", placer._whereabouts(actor, wanted, Parent(), room)[1])
ray.kill(actor)
"""


def test_where_a_pool_is_is_told_however_many_wait_for_it_to_load(cluster: Any, tmp_path: Path) -> None:
    """More than its actor takes at once, and it does not finish loading before it is asked."""
    draft = wanted(cluster.address, "crowded", engines=1, options={"loads_until": str(tmp_path / "never")})
    command = [sys.executable, "-c", CROWD, json.dumps(dataclasses.asdict(draft))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=300)
    assert run.returncode == 0, run.stderr
    pool = int(run.stdout.rpartition("answer")[2])
    assert until(lambda: gone(pool), 15)
    assert until(lambda: named_actors(cluster) == [], 15)
