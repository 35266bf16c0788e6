"""Structured output under speculation: what the grammar forbids is never accepted, and plain's text comes out."""

from __future__ import annotations

import pytest

from tests.e2e import adapters
from tests.e2e.harness import EngineRun, assert_same_texts

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(params=["inline", "process"])
def ours(request: pytest.FixtureRequest) -> EngineRun:
    return adapters.runs()[request.param]


@pytest.fixture
def plain() -> EngineRun:
    return adapters.runs()["plain"]


@pytest.mark.parametrize("name", adapters.STRUCTURES)
def test_the_greedy_text_is_plain_and_as_asked(ours: EngineRun, plain: EngineRun, name: str) -> None:
    assert_same_texts(ours[name], plain[name])
    for result in ours[name].results:
        (output,) = result["outputs"]
        assert output["finish_reason"] == "stop"
        assert adapters.SATISFIED[name](output["text"]), output["text"]


@pytest.mark.parametrize("name", adapters.STRUCTURES)
def test_drafts_were_accepted(name: str) -> None:
    """In the synchronous twin: how many tables of a process are ready in time depends on the machine."""
    assert adapters.runs()["inline"][name].metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def test_samples_are_as_asked(ours: EngineRun) -> None:
    kinds = [name for name in adapters.STRUCTURES for _ in range(3)]
    for name, result in zip(kinds, ours["sampled"].results, strict=True):
        (output,) = result["outputs"]
        assert output["finish_reason"] == "stop"
        assert adapters.SATISFIED[name](output["text"]), output["text"]


def test_seeded_samples_and_free_neighbours_are_plain(ours: EngineRun, plain: EngineRun) -> None:
    assert_same_texts(ours["seeded"], plain["seeded"])
    for name, result in zip(adapters.STRUCTURES, ours["seeded"].results[::2], strict=True):
        assert adapters.SATISFIED[name](result["outputs"][0]["text"])


def test_the_checks_can_fail(plain: EngineRun) -> None:
    """A text of one kind satisfies no other; the two grammars are one language."""
    for name in adapters.STRUCTURES:
        text = plain[name].results[0]["outputs"][0]["text"]
        others = {other for other in adapters.STRUCTURES if other[-7:] != name[-7:] and other != "json"}
        assert not any(adapters.SATISFIED[other](text) for other in others)
    assert not adapters.follows_schema('{"name": "a", "kind": "gamma", "count": 3, "flags": [true, true]}')
