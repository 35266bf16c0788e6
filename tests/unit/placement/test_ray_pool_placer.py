"""How an engine comes to a draft pool, with a made-up Ray: what it says while there is no room, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("ray")
from ray.exceptions import RayActorError

from vllm_saguaro.placement import ray_pool_placer, ray_room
from vllm_saguaro.placement.ray_parent import Ended

WANTED = {"pool": "drafts", "num_cpus": 1, "num_gpus": 0, "resources": {"far": 2.0}, "options": {}, "slots": 1}
PLACED = ("here", 7)
SILENT = TimeoutError()
WAITS, ROOM = {"event": "waits", "lacking": "2 far"}, {"event": "room"}


class Cluster:
    """What Ray answers, one thing a call; and what it was asked to do."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.placed: list[bool | None] = []
        """What it knows of the actor, one a look; then the last one on."""
        self.now = 0.0
        self.killed = 0
        self.asked_for = 0
        self.nobody: list[Exception] = []
        """What Ray says of the name, at first."""
        self.said: list[dict[str, Any]] = []

    def answer(self, *_: Any) -> Any:
        """The next one. A function is called first: something happens meanwhile."""
        answer = self.answers.pop(0)
        answer = answer() if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_placed(self, _: Any) -> bool | None:
        return self.placed.pop(0) if len(self.placed) > 1 else self.placed[0]

    def named(self, _: Any) -> MagicMock:
        self.asked_for += 1
        if self.nobody:
            self.now += 1.0
            raise self.nobody.pop(0)
        return MagicMock()

    def kill(self, *_: Any, **__: Any) -> None:
        self.killed += 1

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def later(self, seconds: float, answer: Any) -> Callable[[], Any]:
        def come() -> Any:
            self.now += seconds
            return answer

        return come

    def join(self) -> None:
        """As the placer of an engine does."""
        ray_pool_placer.draft_in_pool(WANTED, MagicMock(), lambda **said: self.said.append(said))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(ray_pool_placer, "result", made.answer)
    monkeypatch.setattr(ray_pool_placer, "_named", made.named)
    monkeypatch.setattr(ray_pool_placer, "_is_placed", made.is_placed)
    monkeypatch.setattr(ray_pool_placer, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray_pool_placer, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep))
    there = {"available_resources": lambda: {"CPU": 4.0, "far": 1.0}, "get_runtime_context": MagicMock}
    for module in (ray_pool_placer, ray_room):
        monkeypatch.setattr(module, "ray", SimpleNamespace(kill=made.kill, **there))
    return made


def test_it_is_said_once_that_a_pool_waits_for_room_and_when_it_has_some(cluster: Cluster) -> None:
    cluster.answers = [SILENT, SILENT, SILENT, PLACED, {"ended": "over"}]
    cluster.placed = [False, False, True]
    cluster.join()
    assert [said["event"] for said in cluster.said] == ["waits", "room", "placed", "ended"]
    assert cluster.said[:2] == [WAITS, ROOM]


def test_what_a_pool_lacks_is_in_the_log_once_it_has_waited_for_long(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool_placer, "_PATIENCE_SECONDS", 2 * ray_pool_placer.LOOK_SECONDS)
    cluster.answers, cluster.placed = [SILENT, SILENT, SILENT, PLACED, {"ended": "over"}], [False]
    cluster.join()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "Saguaro's draft pool waits for a node of the Ray cluster that has 2 far free."


def test_an_answer_says_that_there_is_room(cluster: Cluster) -> None:
    cluster.answers, cluster.placed = [SILENT, PLACED, {"ended": "over"}], [False]
    cluster.join()
    assert [said["event"] for said in cluster.said] == ["waits", "room", "placed", "ended"]


@pytest.mark.parametrize("placed", [True, None])
def test_of_a_pool_that_is_placed_or_of_which_nothing_is_known_no_room_is_waited_for(
    cluster: Cluster, placed: bool | None
) -> None:
    cluster.answers, cluster.placed = [SILENT, SILENT, PLACED, {"ended": "over"}], [placed]
    cluster.join()
    assert [said["event"] for said in cluster.said] == ["placed", "ended"]


@pytest.mark.parametrize(("placed", "killed"), [(False, 1), (True, 0), (None, 0)])
def test_an_engine_that_ends_takes_a_pool_with_it_that_has_no_room_yet(
    cluster: Cluster, placed: bool | None, killed: int
) -> None:
    cluster.answers, cluster.placed = [SILENT, Ended()], [placed]
    with pytest.raises(Ended):
        cluster.join()
    assert cluster.killed == killed


def test_others_that_wait_for_it_ask_anew_however_often_that_happens(cluster: Cluster) -> None:
    killed = RayActorError(error_msg="The actor is dead because it was killed by `ray.kill`.")
    cluster.answers = [SILENT, killed]
    cluster.answers += [SILENT, cluster.later(ray_pool_placer._GIVEN_UP_SECONDS + 1, killed)] * 2
    cluster.answers += [SILENT, PLACED, {"ended": "over"}]
    cluster.placed = [False]
    cluster.join()
    assert cluster.asked_for == 4
    assert [said["event"] for said in cluster.said] == ["waits", "room", "placed", "ended"]


def test_a_pool_that_dies_again_and_again_before_it_is_placed_is_given_up(cluster: Cluster) -> None:
    died = RayActorError(error_msg="Failed to set up runtime environment.")
    cluster.answers = [SILENT, died, SILENT, cluster.later(ray_pool_placer._GIVEN_UP_SECONDS + 1, died)]
    cluster.placed = [False]
    with pytest.raises(RayActorError, match="runtime environment"):
        cluster.join()
    assert cluster.asked_for == 2


NOBODY = "Failed to look up actor with name 'saguaro-pool-drafts'. This could because 1. You are trying to look up ..."


def test_a_pool_that_ended_as_it_was_to_be_joined_is_asked_for_anew(cluster: Cluster) -> None:
    """It had the name when we wanted to have it, and not any more when Ray looked who has it."""
    cluster.nobody = [ValueError(NOBODY), ValueError(NOBODY)]
    cluster.answers, cluster.placed = [PLACED, {"ended": "over"}], [True]
    cluster.join()
    assert cluster.asked_for == 3
    assert [said["event"] for said in cluster.said] == ["placed", "ended"]


def test_a_name_that_nobody_can_have_is_given_up(cluster: Cluster) -> None:
    cluster.nobody = [ValueError(NOBODY) for _ in range(1000)]
    with pytest.raises(ValueError, match="look up actor"):
        cluster.join()
    assert ray_pool_placer._GIVEN_UP_SECONDS < cluster.now < ray_pool_placer._GIVEN_UP_SECONDS + 5


def test_options_that_ray_does_not_take_are_an_error_at_once(cluster: Cluster) -> None:
    cluster.nobody = [ValueError("num_cpus must be at least 0")]
    with pytest.raises(ValueError, match="num_cpus"):
        cluster.join()
    assert cluster.asked_for == 1
