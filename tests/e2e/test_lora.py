"""LoRA adapters on the target, which the draft knows nothing of; and every feature at once, in one long batch."""

from __future__ import annotations

import pytest

from tests.e2e import adapters
from tests.e2e.harness import EngineRun, Json, assert_same_texts, compare

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(params=["inline", "process"])
def ours(request: pytest.FixtureRequest) -> EngineRun:
    return adapters.runs()[request.param]


@pytest.fixture
def plain() -> EngineRun:
    return adapters.runs()["plain"]


def test_texts_with_adapters_are_plain(ours: EngineRun, plain: EngineRun) -> None:
    assert_same_texts(ours["adapters"], plain["adapters"])
    metrics = ours["adapters"].metrics
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def test_seeded_texts_with_adapters_are_plain(ours: EngineRun, plain: EngineRun) -> None:
    assert_same_texts(ours["adapters, seeds"], plain["adapters, seeds"])


def test_adapters_change_the_text(plain: EngineRun) -> None:
    """So that one that is left out, or taken for the other, would show. Some prompts go on as they must with any."""
    tokens = plain["adapters"].tokens
    kinds = [len({tuple(one) for one in tokens[row : row + 3]}) for row in range(0, len(tokens), 3)]
    assert kinds.count(3) >= 2, kinds


def test_drafts_are_accepted_with_adapters_too(ours: EngineRun) -> None:
    """A draft that knows nothing of the adapter is right less often, and does no harm."""
    scenario = ours["adapters"]
    accepted = [0, 0, 0]
    rows = {result["request_id"]: row for row, result in enumerate(scenario.results)}
    for request_id, length, drafts in scenario.records:
        row = rows[request_id]
        result = scenario.results[row]
        following = result["outputs"][0]["token_ids"][length - result["prompt_length"] :]
        accepted[row % 3] += next((i for i, (a, b) in enumerate(zip(drafts, following, strict=False)) if a != b), 4)
    assert min(accepted) > 0, accepted


# ---- everything at once ---------------------------------------------------------------------------------------------


def test_everything_at_once_is_plain_where_one_text_is_possible(ours: EngineRun, plain: EngineRun) -> None:
    complaints = []
    for row, (a, b) in enumerate(zip(settled(ours), settled(plain), strict=True)):
        for ours_one, theirs_one in zip(a["outputs"], b["outputs"], strict=True):
            complaints += compare(f"row {row}", ours_one, theirs_one)
    assert not complaints, "\n".join(complaints)


def settled(run: EngineRun) -> list[Json]:
    """All but the last three, which are samples without a seed."""
    return run["everything"].results[:-3]


def test_everything_at_once_has_plain_log_probabilities(ours: EngineRun, plain: EngineRun) -> None:
    known = 0
    for a, b in zip(settled(ours), settled(plain), strict=True):
        for x, y in zip(a["outputs"], b["outputs"], strict=True):
            found, expected = x["logprobs"], y["logprobs"]
            assert (found is None) == (expected is None)
            for one, other in zip(found or (), expected or (), strict=True):
                assert one.keys() == other.keys()
                assert all(one[token] == [pytest.approx(p, abs=1e-3), rank] for token, (p, rank) in other.items())
                known += 1
    assert known > 300


def test_everything_at_once_has_the_structures_asked_for(ours: EngineRun) -> None:
    results = settled(ours)[-2 * len(adapters.STRUCTURES) :]
    for name, result in zip([*adapters.STRUCTURES] * 2, results, strict=True):
        text = result["outputs"][0]["text"]
        assert adapters.SATISFIED[name](text), text


def test_everything_at_once_was_speculated_on(ours: EngineRun) -> None:
    metrics = ours["everything"].metrics
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 10
    assert metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
