"""Where slots change hands while the host is a step ahead: arrivals, chunks, preemption, limits, and K by the step."""

from __future__ import annotations

import pytest

from tests.v2 import v2_plans
from tests.v2.v2_runs import Scripted, V2Run

pytestmark = [pytest.mark.slow, pytest.mark.engine]

Three = tuple[V2Run, V2Run, V2Run]
ASKED = v2_plans.ragged("ragged")["requests"]
SCENARIOS = ("depths", "mixed", "guarded")


def texts(scenario: Scripted) -> dict[str, list[int]]:
    return {result["key"]: result["outputs"][0]["token_ids"] for result in scenario.results}


@pytest.mark.parametrize("name", SCENARIOS)
def test_ragged_texts_are_the_targets(ragged: Three, name: str) -> None:
    plain, ours = texts(ragged[0]["ragged"]), texts(ragged[1][name])
    for key, text in ours.items():
        if key == "aborted":  # how far it came before it was aborted is chance
            common = min(len(text), len(plain[key]))
            assert common >= 7
            assert text[:common] == plain[key][:common], key
        else:
            assert text == plain[key], key


def test_the_host_is_a_step_ahead(ragged: Three) -> None:
    assert not ragged[0].answer["facts"]["async"]
    assert ragged[1].answer["facts"]["async"]
    assert ragged[2].answer["facts"]["async"]


@pytest.mark.parametrize("name", ["depths", "mixed"])
def test_every_request_but_the_long_ones_is_admitted_and_each_is_released(ragged: Three, name: str) -> None:
    holds: dict[int, str] = {}
    lengths: dict[str, list[int]] = {}
    for what, slot, request, tokens in ragged[1][name].events:
        if what == "admit":
            assert slot not in holds, "admitted where another one is"
            holds[slot] = request
            lengths.setdefault(request, []).append(tokens)
        elif request in lengths:  # the last ones of the scenario before leave with the first step of this one
            assert holds.pop(slot) == request
    short = {r["id"] for r in ASKED if len(r["prompt"]) < v2_plans.LONGEST_DRAFT}
    assert set(lengths) == short
    again = {request: found for request, found in lengths.items() if len(found) > 1}
    assert again, "nothing was preempted"
    assert all(found == sorted(found) for found in again.values())
    assert any(found[-1] > found[0] for found in again.values()), "none comes back with what it had said"


@pytest.mark.parametrize("name", ["depths", "mixed"])
def test_slots_are_used_again_and_drafts_go_to_whom_they_belong(ragged: Three, name: str) -> None:
    scenario = ragged[1][name]
    slots = [slot for what, slot, *_ in scenario.events if what == "admit"]
    assert len(set(slots)) < len(slots)
    assert scenario.accepted > 30


def test_a_row_without_a_token_has_no_outcome(ragged: Three) -> None:
    rows = [row for name in ("depths", "mixed") for row in ragged[1][name].rounds]
    assert {-1} < {row.accepted for row in rows}, "no chunk of a prompt beside requests that decode"
    assert all(-1 <= row.accepted <= row.verified <= 4 for row in rows)


def test_requests_that_the_draft_cannot_hold_are_counted_as_absent(ragged: Three) -> None:
    assert ragged[1]["depths"].metrics["vllm:saguaro_misses{cause=absent}"] > 0


def test_fewer_drafts_a_step_than_k_are_fine(ragged: Three) -> None:
    plain, _, last = ragged
    assert last["scheduled K"].tokens == plain["greedy"].tokens
    per_step = {row.accepted for row in last["scheduled K"].rounds}
    assert 3 in per_step
    # Four at once, so three drafts each, of the four that were drafted; none of a first token.
    assert {row.verified for row in last["scheduled K"].rounds} == {0, 3}, "the draft is not told how many there were"
    assert not last.answer["facts"]["draft_logits"], "drafts that are never drawn need no q"
