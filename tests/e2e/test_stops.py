"""Stops that lie inside a run of accepted drafts: nothing after them comes out."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Inline, Plain, Process
from tests.e2e.harness import EngineRun, Json, Scenario, compare

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def cases(run: EngineRun, key: str) -> list[Json]:
    return [case for case in run["stops"].results if key in case["params"]]


def inside_an_accepted_run(scenario: Scenario, case: Json) -> bool:
    """Whether, when the text was first decoded, the token at the stop and the next were accepted in one round."""
    request_id, start = case["whole"]["request_id"], case["whole"]["prompt_length"]
    stop = start + case["position"]
    tokens = case["whole"]["outputs"][0]["token_ids"]
    for drafted_id, length, drafts in scenario.records:
        rest = tokens[length - start :][: len(drafts)]
        agreed = next((i for i, (x, y) in enumerate(zip(rest, drafts, strict=False)) if x != y), len(rest))
        if drafted_id == request_id and length <= stop < length + agreed - 1:
            return True
    return False


def test_stop_tokens_lie_inside_accepted_runs(inline: Inline) -> None:
    """So that the tests below look at what they are meant to look at."""
    inside = sum(
        inside_an_accepted_run(inline.default["stops"], case) for case in cases(inline.default, "stop_token_ids")
    )
    assert inside >= 5


@pytest.mark.parametrize("key", ["stop_token_ids", "stop"])
def test_stops_end_the_text_where_plain_vllm_ends_it(inline: Inline, process: Process, plain: Plain, key: str) -> None:
    expected = cases(plain.default, key)
    assert len(expected) >= 10
    for run in (inline.default, process.default):
        found = cases(run, key)
        assert [case["params"] for case in found] == [case["params"] for case in expected]
        complaints = []
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            complaints += compare(f"case {number}", ours["stopped"]["outputs"][0], theirs["stopped"]["outputs"][0])
        assert not complaints, "\n".join(complaints)


def test_a_stop_token_is_the_last_one(inline: Inline, process: Process) -> None:
    for run in (inline.default, process.default):
        for case in cases(run, "stop_token_ids"):
            whole, stopped = case["whole"]["outputs"][0], case["stopped"]["outputs"][0]
            assert stopped["token_ids"] == whole["token_ids"][: case["position"] + 1]
            assert stopped["finish_reason"] == "stop"
            assert stopped["stop_reason"] == whole["token_ids"][case["position"]]
