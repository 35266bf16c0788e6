"""Greedy texts under runner V2: those of plain vLLM, whatever the draft side gives, and as many accepted as it knew."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from tests.v2 import v2_plans
from tests.v2.conftest import SCRIPTS
from tests.v2.v2_runs import K, Round, Scripted, V2Run

pytestmark = [pytest.mark.slow, pytest.mark.engine]

Both = tuple[V2Run, V2Run]


def by_request(scenario: Scripted) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = defaultdict(list)
    for row in scenario.rounds:
        found[row.request_id].append(row)
    return found


def test_the_engine_runs_on_v2_with_our_worker(steady: Both) -> None:
    plain, ours = steady
    assert plain.answer["facts"]["runner"] == ours.answer["facts"]["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert ours.answer["facts"]["worker"] == "SaguaroV2CPUWorker"
    assert ours.answer["facts"]["draft_logits"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_are_the_targets_whatever_is_drafted(steady: Both, script: str) -> None:
    plain, ours = steady
    assert ours[script].tokens == plain["greedy"].tokens


def test_right_drafts_are_accepted_and_wrong_ones_are_not(steady: Both) -> None:
    accepted = {script: steady[1][script].accepted for script in SCRIPTS}
    # A prompt gives the first token; of the others each K + 1 are K drafts and a bonus token.
    others = v2_plans.TOKENS - 1
    assert accepted["oracle"] == 4 * (others - others // (K + 1))
    assert accepted["none"] == accepted["garbage"] == 0
    assert 0 < accepted["depths"] < accepted["mixed"] < accepted["oracle"]


def test_filler_is_never_accepted_and_all_that_is_real_is(steady: Both) -> None:
    looked_at = 0
    for rows in by_request(steady[1]["depths"]).values():
        for before, after in itertools.pairwise(rows):
            left = rows[0].length + v2_plans.TOKENS - 1 - before.length
            assert after.accepted == min(before.ready, left) or (left < K and after.accepted <= before.ready)
            looked_at += before.ready < K
    assert looked_at > 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_draft_hears_every_outcome_as_it_was(steady: Both, script: str) -> None:
    plain, ours = steady
    rows = by_request(ours[script])
    assert len(rows) == 4
    for prompt, text, rounds in zip(v2_plans.GREEDY, plain["greedy"].tokens, rows.values(), strict=True):
        whole = prompt + text
        assert rounds[0].accepted == 0
        assert rounds[0].length == len(prompt) + 1
        for row in rounds:
            assert row.temperature == 0.0
            if row.length <= len(whole):  # vLLM cuts the last round off at max_tokens
                assert row.bonus == whole[row.length - 1]
        for before, after in itertools.pairwise(rounds):
            assert after.length == before.length + after.accepted + 1


def test_hits_and_misses_are_counted(steady: Both) -> None:
    for script in SCRIPTS:
        scenario = steady[1][script]
        hits = sum(row.ready > 0 for row in scenario.rounds)
        assert scenario.metrics["vllm:saguaro_hits"] == hits
        assert scenario.metrics["vllm:saguaro_misses{cause=not_predicted}"] == len(scenario.rounds) - hits


def test_processed_logits_give_the_same_choices(steady: Both) -> None:
    plain, ours = steady
    assert ours["processed"].tokens == plain["processed"].tokens
    assert ours["processed"].accepted > 0


def test_min_p_and_logit_bias_work_as_in_vllm_without_speculation(steady: Both) -> None:
    plain, ours = steady
    for row in (3, 4):
        assert ours["processed"].tokens[row] == plain["processed"].tokens[row]
    assert any(300 <= token < 340 for token in ours["processed"].tokens[3])


def test_greedy_requests_keep_their_text_among_sampled_ones(steady: Both) -> None:
    plain, ours = steady
    assert ours["among sampled"].tokens[0::2] == plain["greedy"].tokens[0::2]
    assert ours["among sampled"].tokens[1::2] != plain["greedy"].tokens[1::2]
    assert sorted({row.temperature for row in ours["among sampled"].rounds}) == [0.0, pytest.approx(1.2)]


def test_a_grammar_holds_and_its_requests_have_certain_drafts(steady: Both) -> None:
    found = steady[1]["structured"]
    assert [result["outputs"][0]["text"] for result in found.results] == ["return self"] * 2
    assert {row.temperature for row in found.rounds} == {0.0}


def test_a_draft_that_fails_is_given_up_and_no_request_notices(steady: Both) -> None:
    plain, ours = steady
    assert ours["draft failed"].tokens == plain["greedy"].tokens
    assert ours["after it failed"].tokens == plain["greedy"].tokens
    assert ours["after it failed"].accepted == 0
    assert not ours["after it failed"].rounds
    assert ours.answer["closed"] == [1]


def test_vllms_calls_at_the_start_leave_nothing_behind(steady: Both) -> None:
    found = steady[1].answer["start_up"]
    assert found["after dummy runs"] == [0, 0], "dummy and profile runs are no steps"
    assert found["ready untouched"]
    assert found["warm-up"] == ["admit", "release"], "made-up requests are ordinary ones"
    assert found["warm-up rounds"] > 0
    assert found["left"] == []
    assert found["captured in a trial"] == 0
    assert found["captured"] == 1
