"""The draft side in a real Ray actor, with the fake model: where it goes, over what it talks, and what is left."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.soaking.processes import command_line, with_descendants
from tests.e2e.shared_names import names_in_shared_memory
from tests.unit.placement.far_draft import MAX_LENGTH, SHAPE
from tests.unit.placement.ray_cluster import ROOT, another_target, environment, free_cpus, groups_left, two_nodes
from tests.unit.placement.test_far_draft import admit, table_of
from tests.unit.placement.watching import gone, until, waits_apart
from vllm_saguaro.counters import DRAFT_RESTARTS, DRAFT_UP, CounterPage
from vllm_saguaro.messages import Stamp, Table
from vllm_saguaro.placement import ray_channel, sharded
from vllm_saguaro.placement.channel import Channel, DraftFailed, NoRoom
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel
from vllm_saguaro.placement.ray_channel import RayChannel, RayDraft, cluster_address
from vllm_saguaro.placement.restarting import RestartingChannel
from vllm_saguaro.placement.sharded import ShardedChannel

MODULE = "tests.unit.placement.far_draft"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@contextlib.contextmanager
def opened(options: dict[str, Any] | None = None, **asked: Any) -> Iterator[RayChannel]:
    cpus = sorted(os.sched_getaffinity(0))[-1:]
    draft = RayDraft(MODULE, options or {}, cpus, **{"num_cpus": 1, **asked})
    with contextlib.closing(RayChannel(draft, SHAPE, environment())) as channel:
        yield channel


def processes(folder: str) -> list[int]:
    """Processes that were started with this path in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and folder in (entry / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry.name))
    return found


def program(pid: int) -> str:
    """What a process runs: of a Python that is its script."""
    words = [word for word in command_line(pid).split() if not word.startswith("-")]
    return words[1] if len(words) > 1 and Path(words[0]).name.startswith("python") else "".join(words[:1])


def listening(pids: list[int]) -> set[str]:
    """Addresses at which these processes wait for connections."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                inodes.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:  # LISTEN
                words = bytes.fromhex(local.partition(":")[0])  # of 32 bits, in this machine's order
                address = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                six = ipaddress.IPv6Address(address) if len(address) == 16 else None
                found.add(str((six and six.ipv4_mapped) or six or ipaddress.IPv4Address(address)))
    return found


def check_that_it_drafts(channel: Channel, generation: int = 1) -> None:
    channel.wait_until_ready()
    assert channel.max_length == MAX_LENGTH
    assert channel.epoch(0) > 0
    assert channel.post(admit(generation))
    table_of(channel, Stamp(1, generation, 0))


# ---- a Ray of our own -----------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
def test_a_local_ray_is_started_and_leaves_nothing(tmp_path: Path) -> None:
    told = tmp_path / "told"
    folders = set(Path(tempfile.gettempdir()).glob("saguaro-ray-*"))
    with names_in_shared_memory() as names, opened({"told": str(told)}) as channel:
        folder = channel._folder
        assert folder is not None
        check_that_it_drafts(channel)
        assert isinstance(channel._link, PassedMemoryChannel), "on one node nothing goes over the network"
        assert channel.resident_bytes > 1 << 20
        assert processes(folder), "the daemons of a Ray of our own"
        doors = listening(with_descendants([os.getpid()]))
        assert doors, "they listen for one another"
        assert all(ipaddress.ip_address(door).is_loopback for door in doors), doors
        assert os.sched_getaffinity(channel.pid), "it is here"
        actor = channel.pid
    assert until(lambda: not processes(folder))
    assert until(lambda: gone(actor))
    assert set(Path(tempfile.gettempdir()).glob("saguaro-ray-*")) <= folders
    assert names.left() == set()
    assert not channel.alive
    assert channel.epoch(0) == 0
    assert not channel.post(admit(2))
    assert channel.read(1) is None
    heard = json.loads(told.read_text())
    assert (heard["cpus"], heard["threads"]) == (sorted(os.sched_getaffinity(0))[-1:], 1)
    assert heard["niceness"] == os.getpriority(os.PRIO_PROCESS, 0), "as the target, not as Ray's workers"


@needs_ray
@pytest.mark.slow
def test_the_actors_death_is_noticed_and_another_channel_starts_anew() -> None:
    with opened() as channel:
        check_that_it_drafts(channel)
        os.kill(channel.pid, signal.SIGKILL)
        assert until(lambda: not channel.alive)
        assert channel.epoch(0) == 0
        assert not channel.post(admit(2))
    with opened() as channel:
        check_that_it_drafts(channel)


@needs_ray
@pytest.mark.slow
def test_a_draft_that_cannot_load_is_a_failed_draft_with_its_reason() -> None:
    with opened({"role": "fails"}) as channel, pytest.raises(DraftFailed, match="this draft cannot be loaded"):
        channel.wait_until_ready()


@needs_ray
@pytest.mark.slow
def test_more_than_this_machine_has_is_refused_at_once() -> None:
    with opened(num_gpus=64) as channel, pytest.raises(DraftFailed, match="64 GPU"):
        channel.wait_until_ready()


@needs_ray
@pytest.mark.slow
def test_everything_ends_with_a_target_that_is_killed() -> None:
    with another_target("test_ray_channel", "opened()") as (target, pid, folder):
        assert processes(folder)
        target.kill()
    assert until(lambda: not processes(folder), 20)
    assert until(lambda: gone(pid), 20)
    assert until(lambda: not Path(folder).exists(), 20)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("last", ["", "/gcs_server", "/raylet", "/runtime_env/agent/main.py"])
def test_closing_while_it_starts_leaves_nothing(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last`: which of Ray's daemons has just come. The placer is killed in the midst of it.

    An agent would go on for ten seconds, and make the folder anew when it has imported what it needs.
    """
    monkeypatch.setattr(ray_channel, "_END_SECONDS", 0.01)
    with opened() as channel:
        folder = str(channel._folder)
        assert until(lambda: not last or any(program(pid).endswith(last) for pid in processes(folder)), 60)
        started = with_descendants([channel._placer.pid])
    assert processes(folder) == []
    assert until(lambda: all(map(gone, started)), 1.0)
    assert not Path(folder).exists()
    with pytest.raises(DraftFailed):
        channel.wait_until_ready()


@needs_ray
@pytest.mark.slow
@pytest.mark.long
def test_what_a_target_leaves_that_is_killed_with_all_it_has_started_goes_with_the_next_start() -> None:
    """vLLM ends its engines so when it has been told to end itself."""
    with another_target("test_ray_channel", "opened()") as (target, _, folder):
        tree = with_descendants([target.pid])
        for pid in tree:
            os.kill(pid, signal.SIGKILL)
        target.wait()
        assert until(lambda: all(map(gone, tree)))
    with opened() as channel:
        channel.wait_until_ready()
        assert not Path(folder).exists()
        assert not processes(folder)


# ---- a cluster of others --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes(head_cpus=1) as made:
        yield made


@needs_ray
@pytest.mark.slow
def test_the_draft_goes_beside_the_target_where_there_is_room(cluster: Any) -> None:
    with opened(address=cluster.address) as channel:
        check_that_it_drafts(channel)
        assert isinstance(channel._link, PassedMemoryChannel)
        assert sorted(os.sched_getaffinity(channel._placer.pid)) == sorted(os.sched_getaffinity(0))[-1:]
        actor = channel.pid
    assert until(lambda: gone(actor))
    assert groups_left(cluster) == []
    assert until(lambda: free_cpus(cluster) == 2.0)


@needs_ray
@pytest.mark.slow
def test_the_draft_goes_to_another_node_where_there_is_no_room_and_talks_over_the_network(cluster: Any) -> None:
    with opened(address=cluster.address) as near, opened(address=cluster.address) as far:
        check_that_it_drafts(near)
        check_that_it_drafts(far)
        kinds = {type(near._link), type(far._link)}
        assert kinds == {PassedMemoryChannel, NetworkChannel}
        assert {near.resident_bytes > 0, far.resident_bytes > 0} == {True, False}
    assert groups_left(cluster) == []


@needs_ray
@pytest.mark.slow
def test_what_only_another_node_has_brings_the_draft_there(cluster: Any, tmp_path: Path) -> None:
    told = tmp_path / "told"
    asked = {"resources": {"far": 1}, "runtime_env": {"env_vars": {"OF_THE_USER": "yes"}}, "namespace": "ours"}
    variables = {"VLLM_OF_THE_TARGET": "1", "OF_THE_USER": "no"}
    with opened({"told": str(told)}, address=cluster.address, variables=variables, **asked) as channel:
        check_that_it_drafts(channel)
        assert isinstance(channel._link, NetworkChannel)
        assert channel.resident_bytes == 0
        os.kill(channel.pid, signal.SIGSTOP)  # a node that is lost says nothing, not even goodbye
        assert channel.post(admit(2))
        assert until(lambda: channel.stalled_seconds > 0.2)
        os.kill(channel.pid, signal.SIGCONT)
        table_of(channel, Stamp(1, 2, 0))
    heard = json.loads(told.read_text())
    assert heard["cpus"] == [], "core numbers of one node mean nothing on another"
    assert heard["namespace"] == "ours"
    assert heard["environment"]["OF_THE_USER"] == "yes"
    assert heard["environment"]["VLLM_OF_THE_TARGET"] == "1"


@needs_ray
@pytest.mark.slow
def test_a_cluster_with_room_for_one_of_three_drafts_has_one_and_another_comes_when_it_has_gone(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> RayChannel:
        cpus = sorted(os.sched_getaffinity(0))[-1:]
        draft = RayDraft(MODULE, {}, cpus, 1, resources={"far": 1}, address=cluster.address)
        return RayChannel(draft, SHAPE, environment())

    monkeypatch.setattr(sharded, "_ROOM_SECONDS", 1.0)
    log, page = logging.getLogger("saguaro-test"), CounterPage()
    drafts = [RestartingChannel(start, 5, page, log) for _ in range(3)]
    with contextlib.closing(ShardedChannel(drafts, SHAPE.slots, log)) as channel:
        channel.wait_until_ready()
        assert channel.max_length == MAX_LENGTH
        (said,) = caplog.messages
        assert said.startswith("Going on with 1 of 3 drafts: no node of the Ray cluster has 1 ")
        (up,) = [draft for draft in drafts if draft.alive]
        assert up.post(admit())
        table_of(up, Stamp(1, 1, 0))
        assert sorted(groups_left(cluster)) == ["CREATED", "PENDING", "PENDING"]
        up.close()
        others = [draft for draft in drafts if draft is not up]
        assert until(lambda: any(draft.alive for draft in others), 240)
        (next_one,) = [draft for draft in others if draft.alive]
        assert next_one.post(admit())
        table_of(next_one, Stamp(1, 1, 0))
        assert (page.value(DRAFT_UP), page.value(DRAFT_RESTARTS)) == (1, 0)
    assert groups_left(cluster) == [], "nor is anything asked for any more"
    assert until(lambda: free_cpus(cluster) == 2.0)


@needs_ray
@pytest.mark.slow
def test_nothing_is_left_in_a_cluster_by_a_target_that_is_killed(cluster: Any) -> None:
    with another_target("test_ray_channel", f"opened(address={cluster.address!r})") as (target, pid, _):
        target.kill()
    assert until(lambda: gone(pid), 20)
    assert until(lambda: groups_left(cluster) == [], 20)
    assert free_cpus(cluster) == 2.0, "the cluster itself goes on"


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_a_failed_draft() -> None:
    with opened(address="127.0.0.1:1") as channel, pytest.raises(DraftFailed, match="no Ray cluster answers at"):
        channel.wait_until_ready()


# ---- without Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[RayChannel]:
    """Whose placer says nothing: it waits for its end in what it takes for Ray."""
    (tmp_path / "ray.py").write_text("import sys\nsys.stdin.buffer.read()\nraise ImportError")
    hidden = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with contextlib.closing(
        RayChannel(RayDraft(MODULE, {}, [0], 1, address="10.0.0.1:6379"), SHAPE, hidden)
    ) as channel:
        yield channel


def test_room_is_waited_for_as_long_as_it_may_take_and_the_rest_longer(silent: RayChannel) -> None:
    silent.wait_for_room(0.0)
    silent._hear({"event": "waits", "lacking": "1 CPU, 2 far"})
    for _ in range(2):  # it may be asked again
        with pytest.raises(NoRoom, match="no node has 1 CPU, 2 far free") as found:
            silent.wait_until_ready()
        assert found.value.lacking == "1 CPU, 2 far"
    assert silent.alive
    silent._hear({"event": "room"})
    waiting, failures = waits_apart(silent)
    waiting.join(0.3)
    assert waiting.is_alive(), "there is room, so it starts; that takes as long as it takes"
    silent.close()
    waiting.join(60)
    assert failures == ["the draft side was closed while it started"]


def test_c_is_that_of_the_link(silent: RayChannel) -> None:
    assert silent.sampling_c is None
    silent._hear({"event": "placed", "pid": os.getpid(), "beside": True})
    assert silent._link is not None
    silent._link._mailbox.publish(Table(Stamp(0, 1, 0), [], [], [], sampling_c=0.3))
    assert silent.sampling_c == 0.3
    silent._hear({"event": "ended", "reason": "it is over"})
    assert silent.sampling_c is None


def test_a_link_that_gets_no_thread_is_a_failed_draft_at_once(
    silent: RayChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ray_channel, "PassedMemoryChannel", refuse)
    silent._hear({"event": "placed", "pid": os.getpid(), "beside": True})
    with pytest.raises(DraftFailed, match="no link can be opened: can't start new thread"):
        silent.wait_until_ready()


def test_a_draft_that_has_not_been_placed_in_time_has_failed(
    silent: RayChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_channel, "START_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(DraftFailed, match=r"had not placed the draft after 0 s$"):
        silent.wait_until_ready()


def test_without_ray_the_draft_has_failed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('there is no Ray here')")
    draft = RayDraft(MODULE, {}, [0], num_cpus=1)
    hidden = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with contextlib.closing(RayChannel(draft, SHAPE, hidden)) as channel:
        with pytest.raises(DraftFailed, match="Ray"):
            channel.wait_until_ready()
        assert not channel.alive


@pytest.mark.parametrize(
    ("asked", "variable", "expected"),
    [("auto", "10.0.0.1:6379", "auto"), (None, "10.0.0.1:6379", "10.0.0.1:6379"), (None, "", None), (None, None, None)],
)
def test_which_cluster_is_used(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, variable: str | None, expected: str | None
) -> None:
    if variable is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(asked) == expected


def test_the_cluster_of_this_process_comes_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        gcs_address = "10.0.0.7:6379"

    class FakeRay:
        is_initialized: Callable[[], bool] = staticmethod(lambda: True)
        get_runtime_context: Callable[[], Context] = staticmethod(Context)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    assert cluster_address(None) == "10.0.0.7:6379"
