"""A draft that dies, hangs or comes back costs speed, never a request; and no draft outlives its engine."""

from __future__ import annotations

import pytest

from tests.e2e import plans
from tests.e2e.conftest import Plain, Process
from tests.e2e.harness import (
    BASE,
    EngineRun,
    assert_same_texts,
    engines,
    is_gone_within,
    saguaro,
)
from tests.e2e.shared_names import names_in_shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def errors(run: EngineRun) -> list[str]:
    return [line for line in run.log.splitlines() if " ERROR " in line or "Traceback" in line]


def test_a_draft_killed_in_mid_run_costs_no_request(process: Process, plain: Plain) -> None:
    killed = process.draftless["draft killed"]
    assert_same_texts(killed, plain.default["eight at once"])
    assert killed.metrics["vllm:saguaro_misses{cause=absent}"] > 8 * 20  # it was killed early on


def test_a_killed_draft_that_is_not_to_be_restarted_is_told_in_one_line(process: Process) -> None:
    (line,) = errors(process.draftless)
    assert "The draft side has ended. After 0 restarts in a row it is left off" in line


def test_requests_that_come_after_the_drafts_death_are_served(process: Process, plain: Plain) -> None:
    without = process.draftless["without a draft"]
    assert_same_texts(without, plain.default["eight at once"])
    assert without.hits == 0
    assert without.metrics["vllm:spec_decode_num_draft_tokens"] == 0


def test_a_hanging_draft_costs_no_request(process: Process, plain: Plain) -> None:
    stopped = process.default["draft stopped"]
    assert_same_texts(stopped, plain.default["eight at once"])
    assert stopped.metrics["vllm:saguaro_misses{cause=late}"] > 8 * 20  # it was stopped early on
    assert stopped.seconds < 30


def test_a_draft_that_hung_is_of_use_again(process: Process, plain: Plain) -> None:
    back = process.default["draft back"]
    assert_same_texts(back, plain.default["eight at once"])
    assert back.hits > 0


def test_healthy_engines_log_no_error(process: Process) -> None:
    assert errors(process.default) == []
    assert errors(process.ragged) == []


def test_shutdown_ends_the_draft(process: Process) -> None:
    assert process.draft_gone_after_shutdown
    assert process.default.answer["shutdown_seconds"] < 5  # beyond that it would have been ended by force


def test_killing_the_engine_ends_the_draft(process: Process) -> None:
    assert process.draft_gone_after_kill


@pytest.mark.long
def test_an_exception_in_the_engines_process_ends_the_draft() -> None:
    spec = {"options": BASE | saguaro(), "scenarios": [plans.several_outputs()], "end": "raise"}
    with names_in_shared_memory() as names, engines([spec]) as group:
        pid = group.read_engine().answer["draft_pid"]
        assert group.process.wait(60) == 1
        assert is_gone_within(pid, 3)
        assert "the engine's process ends with this" in group.whole_log()
    assert names.left() == set()


def test_nothing_stays_in_shared_memory(process: Process) -> None:
    assert process.memory_left == set()
