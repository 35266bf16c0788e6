"""What an engine's process is asked, what is made of its answers, and that it ends; no process is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.unit.tuning.test_observations import seen
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.tuning import measuring
from vllm_saguaro.tuning.candidates import DRAFT_MODEL, SAGUARO, Candidate
from vllm_saguaro.tuning.measuring import measure, plain, steps_of, tokens_in_time
from vllm_saguaro.tuning.settings import Settings

SETTINGS = Settings("t", "d", ("--dtype", "float32"), {"draft_cpus": "1"}, batches=(1, 4), temperatures=(0.0, 0.7))
CANDIDATE = Candidate(SAGUARO, {"num_speculative_tokens": 4})


class Worker:
    """Answers each order with the next speed; notes what it was asked, and how it ended."""

    made: ClassVar[list[Worker]] = []
    speeds: ClassVar[list[float]] = []
    observations: Any = None
    fails = False

    def __init__(self, name: str, log: Path, module: str, offline: bool) -> None:
        self.name, self.module, self.offline = name, module, offline
        self.orders: list[dict[str, Any]] = []
        self.end = ""
        Worker.made.append(self)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.orders.append(order)
        if Worker.fails:
            raise WorkerError("it fails")
        speed = Worker.speeds.pop(0) if Worker.speeds and len(self.orders) > 1 else 100.0
        return {"decode_tokens": speed, "decode_seconds": 1.0, "observations": Worker.observations}

    def cpu_seconds(self) -> float:
        return 0.0

    def end_now(self) -> None:
        self.end = "killed"

    def close(self) -> None:
        self.end = "closed"


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    Worker.made, Worker.speeds, Worker.observations, Worker.fails = [], [], None, False
    monkeypatch.setattr(measuring, "WorkerHandle", Worker)
    monkeypatch.setattr(measuring.procfs, "busy_seconds", lambda _: 0.0)
    return Worker.made


class Steps(Progress):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, doing: str) -> None:
        self.seen.append(doing)


def test_an_engine_is_started_as_the_server_would_be_and_serves_every_load(workers: list[Worker]) -> None:
    progress = Steps()
    found = measure(SETTINGS, CANDIDATE, progress)
    (worker,) = workers
    start, *asked = worker.orders
    assert (start["target"], start["words"]) == ("t", ["--dtype", "float32"])
    assert start["llm"]["speculative_config"] == {
        "method": "saguaro",
        "model": "d",
        "num_speculative_tokens": 4,
        "draft_cpus": "1",
    }
    assert not start["watched"]
    assert (worker.module, worker.offline, worker.end) == (measuring.MODULE, True, "closed")
    loads = list(dict.fromkeys((order["batch"], order["temperature"]) for order in asked))
    assert loads == SETTINGS.loads == list(found.tried.speeds)
    assert len(asked) == len(loads) * (1 + SETTINGS.repetitions)
    assert [order["prompts"] for order in asked[:3]] == [1, 3, 3], "a warm-up, then both repetitions"
    assert len(progress.seen) == steps_of(SETTINGS)


def test_speeds_are_medians_with_their_spread() -> None:
    Worker.speeds = [1000.0, 200.0, 100.0, 120.0]
    settings = dataclasses.replace(SETTINGS, batches=(1,), temperatures=(0.0,), repetitions=3)
    tried = measure(settings, plain(), Progress()).tried
    assert tried.speeds == {(1, 0.0): 120.0}
    assert tried.spread == {(1, 0.0): (100.0, 200.0)}


@pytest.mark.parametrize(
    ("candidate", "watched"), [(CANDIDATE, True), (plain(), False), (Candidate(DRAFT_MODEL), False)]
)
def test_only_our_own_engine_is_watched(workers: list[Worker], candidate: Candidate, watched: bool) -> None:
    Worker.observations = seen().to_json() if watched else None
    found = measure(SETTINGS, candidate, Progress(), watched=True)
    assert workers[0].orders[0]["watched"] is watched
    assert set(found.observations) == (set(SETTINGS.loads) if watched else set())
    if watched:
        assert found.observations[1, 0.0].outcomes == SETTINGS.repetitions * seen().outcomes


@pytest.mark.parametrize("error", [WorkerError, KeyboardInterrupt])
def test_what_is_given_up_is_ended_at_once(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(Worker, "ask", stop)
    with pytest.raises(error):
        measure(SETTINGS, CANDIDATE, Progress())
    assert workers[0].end == "killed"


def test_others_on_the_cores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings before and after: of a second of one core half was others' work."""
    clock = iter(range(0, 10_000))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    busy = iter(x / 2 for x in range(10_000))
    monkeypatch.setattr(measuring.procfs, "busy_seconds", lambda _: next(busy))
    assert measure(SETTINGS, CANDIDATE, Progress()).foreign_cpu == pytest.approx(0.5)


@pytest.mark.parametrize(("batch", "speed", "tokens"), [(1, 100.0, 64), (1, 3.0, 30), (4, 3.0, 22), (1, 0.1, 16)])
def test_texts_are_shorter_on_a_slow_machine(batch: int, speed: float, tokens: int) -> None:
    """A twentieth of ten minutes: 30 s for three texts one after the other, or for four at once."""
    assert tokens_in_time(SETTINGS, batch, speed) == tokens


def test_the_watched_engine_has_the_users_keys_but_for_those_that_would_hide_something() -> None:
    fixed = {"adaptive": True, "backup": "jit", "branches": "auto", "draft_cpus": "1"}
    settings = dataclasses.replace(SETTINGS, fixed=fixed)
    candidate = CANDIDATE.changed(branches=24, backup="none", adaptive=False)
    told = measuring.order_of(settings, candidate, watched=True)["llm"]["speculative_config"]
    assert told == {"method": "saguaro", "model": "d", **candidate.keys, "draft_cpus": "1"}
    told = measuring.order_of(settings, candidate, watched=False)["llm"]["speculative_config"]
    assert told == {"method": "saguaro", "model": "d", **candidate.keys, **fixed}
    settings = dataclasses.replace(SETTINGS, fixed={"branches": 8})
    assert measuring.order_of(settings, candidate, watched=True)["llm"]["speculative_config"]["branches"] == 8
