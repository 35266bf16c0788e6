"""Where slots change hands while the host is a step ahead: arrivals, chunks, preemption, limits, and K by the step."""

from __future__ import annotations

import itertools

import pytest

from tests.v2 import v2_plans
from tests.v2.v2_runs import Round, Scripted, V2Run, assert_same_arrivals

pytestmark = [pytest.mark.slow, pytest.mark.engine]

Three = tuple[V2Run, V2Run, V2Run]
ASKED = v2_plans.ragged("ragged")["requests"]
SCENARIOS = ("depths", "mixed", "guarded")


@pytest.mark.parametrize("name", SCENARIOS)
def test_ragged_texts_are_the_targets(ragged: Three, name: str) -> None:
    assert_same_arrivals(ragged[1][name], ragged[0]["ragged"])


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


def steps(scenario: Scripted) -> list[list[Round]]:
    """The rows of each exchange: of two that follow each other the first row's request is in both."""
    found: list[list[Round]] = [[]]
    for row in scenario.rounds:
        if row.request_id in {each.request_id for each in found[-1]}:
            found.append([])
        found[-1].append(row)
    return found


def test_fewer_drafts_a_step_than_k_and_none_are_fine(ragged: Three) -> None:
    plain, _, last = ragged
    assert last["scheduled K"].tokens == plain["leaving"].tokens
    assert not last.answer["facts"]["draft_logits"], "drafts that are never drawn need no q"
    found = steps(last["scheduled K"])
    assert {row.verified for row in found[0]} == {0}, "a first token has no drafts"
    seen = set()
    for before, after in itertools.pairwise(found):
        # How many a step hands over is decided by its own rows; they are verified in the next one.
        wanted = v2_plans.SCHEDULED[len(before)]
        assert {row.verified for row in after} == {wanted}, "the draft is not told how many there were"
        assert all(row.accepted <= wanted for row in after)
        seen.add((wanted, max(row.accepted for row in after)))
    assert {wanted for wanted, _ in seen} == {3, 0, 2, 4}
    assert {(3, 3), (0, 0), (2, 2), (4, 4)} <= seen, "what an oracle says is accepted, as far as it is asked"


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_others_have_computed_is_taken_over(ragged: Three, name: str) -> None:
    """Prompts that begin as another one did begin behind that, and the draft reads them whole."""
    assert ragged[1][name].metrics["vllm:prefix_cache_hits"] > 0
