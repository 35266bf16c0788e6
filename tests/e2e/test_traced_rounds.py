"""A trace of real engines: whole, in step with the counters, and with no trace of itself in what is emitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e import plans
from tests.e2e.conftest import Plain
from tests.e2e.harness import BASE, EngineRun, Json, assert_same_texts, run_engines, saguaro

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PLACEMENTS = ("process", "inline")
SCENARIOS = [plans.greedy(1, count=4), plans.greedy(8, count=8)]
MISSES = ("not_predicted", "late", "absent")


@dataclass(frozen=True)
class Traced:
    """What an engine gave, and what its trace says."""

    run: EngineRun
    events: list[Json]

    def named(self, *names: str) -> list[Json]:
        return [event for event in self.events if event["name"] in names]

    def counted(self, name: str) -> float:
        """A counter over all scenarios."""
        return sum(scenario.metrics[f"vllm:saguaro_{name}"] for scenario in self.run.scenarios.values())

    def told(self, name: str) -> int:
        """The same by the trace. The last step is that of the request with which the others leave, after the count."""
        *steps, last = self.named("outcomes")
        assert sum(last["args"][kind] for kind in ("hits", *MISSES)) == 1
        return sum(event["args"][name] for event in steps)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    folder = tmp_path_factory.mktemp("traces")
    paths = [folder / f"{placement}.json" for placement in PLACEMENTS]
    keys = {"adaptive": False}  # a busy machine would be a reason to go quiet
    options = [saguaro(placement=name, trace=str(path), **keys) for name, path in zip(PLACEMENTS, paths, strict=True)]
    runs = run_engines([{"options": BASE | one, "scenarios": SCENARIOS} for one in options])
    assert sorted(folder.iterdir()) == sorted(paths)
    found = zip(PLACEMENTS, runs, paths, strict=True)
    return {name: Traced(run, events_of(path)) for name, run, path in found}


@pytest.fixture(params=PLACEMENTS)
def traced(request: pytest.FixtureRequest, traces: dict[str, Traced]) -> Traced:
    return traces[request.param]


def events_of(path: Path) -> list[Json]:
    text = path.read_text(encoding="utf-8")
    first, *lines = text.splitlines()
    assert first == "["
    found: list[Json] = json.loads(text.rstrip().removesuffix(",") + "]")
    assert found == [json.loads(line.removesuffix(",")) for line in lines]
    return found


def overlap(one: Json, other: Json) -> float:
    """Microseconds that both took together."""
    return min(one["ts"] + one["dur"], other["ts"] + other["dur"]) - max(one["ts"], other["ts"])


@pytest.mark.parametrize("name", [scenario["name"] for scenario in SCENARIOS])
def test_no_text_is_another_one(traced: Traced, plain: Plain, name: str) -> None:
    found = traced.run[name]
    assert_same_texts(found, plain.default[name].first(len(found.results)))


def test_every_event_has_its_place_and_time(traced: Traced) -> None:
    names = {event["pid"]: event["args"]["name"] for event in traced.named("process_name")}
    assert names == {1: "target", 2: "draft 0"}
    for event in traced.events:
        assert event["tid"] == 0
        if event["ph"] != "M":
            assert event["cat"] == ("target" if event["pid"] == 1 else "draft")
            assert event["ts"] > 0
        if event["ph"] == "X":
            assert event["dur"] >= 0


def test_the_steps_of_the_target_follow_one_another(traced: Traced) -> None:
    passes = traced.named("verify", "forward")
    assert {event["name"] for event in passes} == {"verify", "forward"}
    assert [event["args"]["step"] for event in passes] == list(range(1, len(passes) + 1))
    for before, after in pairwise(passes):
        assert before["ts"] + before["dur"] <= after["ts"]


def test_what_the_trace_tells_is_what_was_counted(traced: Traced) -> None:
    assert traced.told("hits") == traced.counted("hits") > 0
    for cause in MISSES:
        assert traced.told(cause) == traced.counted(f"misses{{cause={cause}}}")
    assert traced.told("backups") == traced.counted("backups{kind=ngram}") + traced.counted("backups{kind=jit}")


def test_the_draft_tells_its_rounds(traced: Traced) -> None:
    assert [event["pid"] for event in traced.named("draft up")] == [2]
    rounds = [event for event in traced.named("round") if "why" not in event["args"]]
    assert rounds
    assert all(event["pid"] == 2 and event["args"]["rows"] >= 1 for event in rounds)
    assert max(event["args"]["rows"] for event in rounds) > 1
    assert max(event["args"]["branches"] for event in rounds) > 1
    assert {event["name"] for event in traced.events if event["pid"] == 2} >= {"glue", "fork", "decode", "prompt"}
    last = traced.named("outcomes")[-1]["args"]["step"]
    assert {event["args"]["step"] for event in rounds} <= set(range(1, last + 2))


def test_a_draft_in_a_process_works_while_the_target_verifies(traces: dict[str, Traced]) -> None:
    found = traces["process"]
    assert any(overlap(one, other) > 0 for one in found.named("verify") for other in found.named("round"))


def test_inline_nothing_overlaps_and_the_target_waits(traces: dict[str, Traced]) -> None:
    found = traces["inline"]
    assert all(overlap(one, other) <= 0.01 for one in found.named("verify") for other in found.named("round"))
    waits = [event for event in found.named("wait") if event["args"]["why"] == "inline"]
    for one in found.named("round"):
        assert any(overlap(one, wait) >= one["dur"] - 0.01 for wait in waits)
