"""A draft process that is killed, hangs, runs out of memory or dies at every start, under a real engine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.e2e import plans
from tests.e2e.conftest import Plain
from tests.e2e.harness import (
    BASE,
    EngineRun,
    Scenario,
    assert_same_texts,
    engines,
    is_gone_within,
    saguaro,
)
from tests.e2e.shared_names import names_in_shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FAULTS = ("kill_draft", "stop_draft", "starve_draft")
CARE = {"first_back_off": 0.2, "longest_back_off": 0.4, "good_life": 0.5, "hang": 1.0, "longest_hang": 1.0}
"""Quick, and each fault by itself: a life that has served a scenario was a good one."""


@dataclass(frozen=True)
class Restarts:
    """One engine, one fault after the other. The draft is gone from the first step on, and back at the twelfth."""

    run: EngineRun
    memory_left: set[str]
    all_gone: bool

    def __getitem__(self, name: str) -> Scenario:
        return self.run[name]


@pytest.fixture(scope="module")
def restarts() -> Restarts:
    scenarios = [plans.with_events(fault, (0, fault), (12, "await_draft")) for fault in FAULTS]
    scenarios += [
        plans.with_events("afterwards"),
        plans.with_events("left off", (0, "break_draft"), (0, "kill_draft"), (12, "await_left_off")),
        plans.with_events("without"),
    ]
    spec = {"options": BASE | saguaro(draft_restarts=3), "scenarios": scenarios, "care": CARE}
    with names_in_shared_memory() as names, engines([spec]) as group:
        run = group.read_engine()
        assert group.process.wait(60) == 0
        gone = all(is_gone_within(pid, 3) for pid in run.answer["draft_pids"])
    return Restarts(run, names.left(), gone)


@pytest.mark.parametrize("name", [*FAULTS, "afterwards", "left off", "without"])
def test_no_request_has_another_text(restarts: Restarts, plain: Plain, name: str) -> None:
    assert_same_texts(restarts[name], plain.default["eight at once"])


@pytest.mark.parametrize("fault", FAULTS)
def test_hits_come_back_for_the_requests_that_run(restarts: Restarts, fault: str) -> None:
    found = restarts[fault]
    assert found.metrics["vllm:saguaro_draft_restarts"] == 1
    assert found.hits > 0, "the draft was gone before the first step"
    assert found.metrics["vllm:saguaro_misses{cause=absent}"] >= 8


def test_another_engine_run_is_as_good_as_ever(restarts: Restarts) -> None:
    """Of the outcomes whose table was there. How many tables are in time depends on what else the machine does."""
    after = restarts["afterwards"]
    assert after.hits > 0.5 * after.metrics["vllm:saguaro_misses{cause=not_predicted}"]
    assert after.metrics["vllm:saguaro_draft_restarts"] == 0


def test_a_draft_that_dies_at_every_start_is_left_off(restarts: Restarts) -> None:
    assert restarts["left off"].metrics["vllm:saguaro_draft_restarts"] == 3
    assert restarts["left off"].metrics["vllm:saguaro_draft_left_off"] == 1
    assert restarts["left off"].metrics["vllm:saguaro_draft_up"] == -1, "it was up before"
    assert restarts["without"].hits == 0
    assert restarts["without"].metrics["vllm:saguaro_draft_restarts"] == 0
    (line,) = restarts.run.log_lines("it is left off")
    assert " ERROR " in line
    assert "After 3 restarts in a row" in line


def test_each_end_and_each_return_is_told_once(restarts: Restarts) -> None:
    until = "Decoding goes on without drafts until it is back"
    ended = restarts.run.log_lines("The draft side has ended.", until)
    hung = restarts.run.log_lines("has not read a step for", until)
    # One without memory takes a while to end: where the machine is busy it may be found hanging before.
    assert (len(ended), len(hung)) in {(3, 1), (2, 2)}
    assert len(restarts.run.log_lines("The draft side is back")) == 3


def test_nothing_is_left_of_any_of_them(restarts: Restarts) -> None:
    assert len(set(restarts.run.answer["draft_pids"])) == 4  # three faults, and the one that was killed at last
    assert restarts.all_gone
    assert restarts.memory_left == set()
    assert restarts.run.answer["left"] == {"requests": 0, "slots_taken": 0}
