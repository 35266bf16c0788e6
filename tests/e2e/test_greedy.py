"""Greedy texts are plain vLLM's, token by token, in float32; and the drafts are as good as vLLM's own."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import FAN_OUTS, Inline, Plain, Process
from tests.e2e.harness import EngineRun, Scenario, assert_same_texts

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCENARIOS = ("greedy, batch 1", "greedy, batch 8", "few tokens", "n=2", "processed logits")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_inline_gives_plain_texts(inline: Inline, plain: Plain, scenario: str) -> None:
    assert_same_texts(inline.default[scenario], plain.default[scenario])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_process_gives_plain_texts(process: Process, plain: Plain, scenario: str) -> None:
    assert_same_texts(process.default[scenario], plain.default[scenario])


@pytest.mark.parametrize("placement", ["inline", "process"])
def test_greedy_rows_are_plain_among_sampled_ones(request: pytest.FixtureRequest, plain: Plain, placement: str) -> None:
    group: Inline | Process = request.getfixturevalue(placement)
    found = group.default["greedy among sampled"].tokens
    assert found[::2] == plain.default["greedy, batch 8"].tokens[:8:2]
    assert found[1::2] != plain.default["greedy, batch 8"].tokens[1:8:2]


def test_top_k_gives_plain_texts(only_top_k: EngineRun, plain: Plain) -> None:
    assert_same_texts(only_top_k["top_k=1"], plain.default["top_k=1"])


@pytest.mark.parametrize("scenario", SCENARIOS[:2])
def test_hits_and_misses_both_happen(inline: Inline, process: Process, scenario: str) -> None:
    for run in (inline.default, process.default):
        assert run[scenario].hits > 0
        assert run[scenario].misses > 0


@pytest.mark.parametrize("name", FAN_OUTS)
def test_every_fan_out_gives_plain_texts(inline: Inline, plain: Plain, name: str) -> None:
    found = inline.fan_outs[name]["greedy, batch 8"]
    assert found.tokens == plain.default["greedy, batch 8"].tokens[:8]
    assert found.hits > 0
    assert found.misses > 0


def test_more_branches_hit_more_often(inline: Inline) -> None:
    rate = {name: run["greedy, batch 8"].hit_rate() for name, run in inline.fan_outs.items()}
    assert rate["geometric, K=1, N=1"] < inline.default["greedy, batch 8"].hit_rate() < rate["ranked, K=6, N=48"]


# ---- acceptance -----------------------------------------------------------------------------------------------------


def drafts_by_place(scenario: Scenario) -> dict[tuple[int, int], list[int]]:
    """What was drafted where: (prompt, tokens of the text before the drafts) -> drafts."""
    row = {result["request_id"]: number for number, result in enumerate(scenario.results)}
    return {(row[request_id], length): drafts for request_id, length, drafts in scenario.records if drafts}


def accepted(scenario: Scenario, place: tuple[int, int], drafts: list[int]) -> int | None:
    """How many of the drafts the greedy text goes on with; None where the text ends before that is known."""
    result = scenario.results[place[0]]
    rest = result["outputs"][0]["token_ids"][place[1] - result["prompt_length"] :][: len(drafts)]
    if len(rest) < len(drafts):
        return None
    return next((i for i, (x, y) in enumerate(zip(rest, drafts, strict=True)) if x != y), len(drafts))


def test_drafts_are_those_of_draft_model_wherever_both_drafted(inline: Inline, plain: Plain) -> None:
    """Both decode the same text with the same draft model, so at the same place they must draft the same."""
    ours = drafts_by_place(inline.default["greedy, batch 1"])
    theirs = drafts_by_place(plain.draft_model["greedy, batch 1"])
    places = ours.keys() & theirs.keys()
    assert len(places) > 100
    same = sum(ours[place] == theirs[place] for place in places)
    assert same >= 0.995 * len(places), f"{same} of {len(places)}"  # two likeliest drafts may be a rounding error apart


def test_accepted_tokens_a_round_are_those_of_draft_model(inline: Inline, plain: Plain) -> None:
    """Within 3 %, over the places at which both drafted: elsewhere it is the text that differs, not the drafts."""
    ours, theirs = inline.default["greedy, batch 1"], plain.draft_model["greedy, batch 1"]
    our_drafts, their_drafts = drafts_by_place(ours), drafts_by_place(theirs)
    pairs = [
        (accepted(ours, place, our_drafts[place]), accepted(theirs, place, their_drafts[place]))
        for place in our_drafts.keys() & their_drafts.keys()
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    our_mean, their_mean = (sum(column) / len(known) for column in zip(*known, strict=True))
    assert their_mean > 0.3
    assert our_mean == pytest.approx(their_mean, rel=0.03)


def test_rounds_with_drafts_accept_no_less_than_draft_model_does(inline: Inline, plain: Plain) -> None:
    """By vLLM's own counters. More is fine: rounds without drafts follow a miss, where drafts do worse than average."""
    ours, theirs = inline.default["greedy, batch 1"], plain.draft_model["greedy, batch 1"]
    assert ours.acceptance >= 0.97 * theirs.acceptance


def test_complete_tables_give_k_drafts(inline: Inline) -> None:
    scenario: Scenario = inline.default["greedy, batch 1"]
    assert {len(drafts) for _, _, drafts in scenario.records} == {0, 4}
    assert scenario.metrics["vllm:saguaro_late_tables"] == 0


# ---- what a wrong draft KV looks like -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no_copy", "wrong_branch"])
def test_wrong_draft_kv_leaves_the_text_but_not_the_acceptance(inline: Inline, plain: Plain, how: str) -> None:
    """The comparisons of acceptance above can fail: this is what they see when the draft's KV is wrong."""
    healthy, broken = inline.default["greedy, batch 8"], inline.default[how]
    assert_same_texts(broken, plain.default["greedy, batch 8"].first(8))
    assert emitted_a_round(broken) < 0.75 * emitted_a_round(healthy)


def emitted_a_round(scenario: Scenario) -> float:
    """Tokens a round: falls with the hit rate and with the acceptance."""
    return sum(map(len, scenario.tokens)) / (scenario.hits + scenario.misses)


# ---- nothing is left ------------------------------------------------------------------------------------------------


def test_finished_requests_leave_nothing_behind(inline: Inline, process: Process) -> None:
    """One request is still there, the one that flushed the others out."""
    runs: list[EngineRun] = [inline.default, inline.ragged, process.default, process.ragged]
    for run in runs:
        assert run.answer["left"]["requests"] <= 1
        assert run.answer["left"]["slots_taken"] <= 1
    for run in runs[:2]:
        assert run.answer["left"]["blocks_taken"] <= 1 + 2 * 12  # one short text, and two blocks for each branch
