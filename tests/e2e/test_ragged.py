"""Requests that come, go, wait, are cut into pieces and thrown out: each still gets plain vLLM's text."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Inline, Plain, Process
from tests.e2e.harness import EngineRun, compare

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(params=["inline", "process"])
def run(request: pytest.FixtureRequest) -> EngineRun:
    group: Inline | Process = request.getfixturevalue(request.param)
    return group.ragged


def test_every_finished_request_has_its_plain_text(run: EngineRun, plain: Plain) -> None:
    ours, theirs = run["ragged"].by_key(), plain.ragged["ragged"].by_key()
    assert ours.keys() == theirs.keys()
    finished = [key for key in theirs if not theirs[key]["aborted"]]
    assert finished == [key for key in ours if not ours[key]["aborted"]]
    complaints = []
    for key in finished:
        complaints += compare(key, ours[key]["outputs"][0], theirs[key]["outputs"][0])
    assert not complaints, "\n".join(complaints)


def test_what_came_before_an_abort_is_the_beginning_of_the_plain_text(run: EngineRun, plain: Plain) -> None:
    ours, theirs = run["ragged"].by_key(), plain.ragged["ragged"].by_key()
    aborted = [key for key in theirs if theirs[key]["aborted"]]
    assert len(aborted) == 3
    for key in aborted:
        a, b = (side[key]["outputs"][0]["token_ids"] for side in (ours, theirs))
        common = min(len(a), len(b))
        assert a[:common] == b[:common], key


def test_it_was_ragged_indeed(run: EngineRun, inline: Inline, plain: Plain) -> None:
    for one in (run, plain.ragged):
        assert one["ragged"].metrics["vllm:prefix_cache_hits"] > 0
    assert run["ragged"].misses > 0
    # With a draft in a process how many run at once depends on how many drafts are in time: they may all find room.
    for one in (inline.ragged, plain.ragged):
        assert one["ragged"].metrics["vllm:num_preemptions"] > 0


def test_hits_happen_among_ragged_requests(inline: Inline) -> None:
    assert inline.ragged["ragged"].hits > 50
    assert inline.ragged["ragged"].hit_rate() > 0.3


def test_the_text_ends_at_the_models_limit(run: EngineRun) -> None:
    for length in (255, 254, 251, 240):
        result = run["ragged"].by_key()[f"limit {length}"]
        assert result["prompt_length"] == length
        assert len(result["outputs"][0]["token_ids"]) == 256 - length
        assert result["outputs"][0]["finish_reason"] == "length"
