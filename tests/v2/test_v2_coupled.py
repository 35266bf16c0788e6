"""Coupled drafts under runner V2: with a seed the text is plain V2's, token by token, and drafts are mostly right.

Without one the samples are the target's: every request has a seed there, its own or a random one.
"""

from __future__ import annotations

import pytest

from tests.v2 import v2_plans
from tests.v2.drawn_samples import samples_p
from tests.v2.v2_runs import OPTIONS, Scripted, V2Run, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine]

CHANCE = 1e-3
"""How unlikely samples must be to be wrong."""
SAMPLES = 48
STREAM = {"placement": "stream", "branches": 8}
Runs = tuple[V2Run, V2Run, V2Run]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Plain vLLM; drafts of a script; and a real draft on a stream, the host a step ahead."""
    plain, scripted, stream = run_v2(
        [
            {"options": OPTIONS, "scripted": False, "scenarios": [v2_plans.seeded("plain")]},
            {
                "options": OPTIONS | saguaro(),
                "scenarios": [v2_plans.seeded(script, script=script) for script in ("oracle", "mixed", "none")],
            },
            {
                "options": OPTIONS | {"max_num_seqs": 16} | saguaro(**STREAM),
                "scripted": False,
                "async": True,
                "scenarios": [
                    v2_plans.seeded("guarded", guarded=True),
                    v2_plans.drawn("samples", SAMPLES),
                    v2_plans.seeded("stale", plant="stream: stale"),
                    v2_plans.seeded("believed", plant="first draft believed"),
                ],
            },
        ]
    )
    return plain, scripted, stream


@pytest.fixture(scope="module")
def process() -> V2Run:
    ours = saguaro(placement="process", branches=8)
    (found,) = run_v2(
        [{"options": OPTIONS | ours, "scripted": False, "async": True, "scenarios": [v2_plans.seeded("seeded")]}]
    )
    return found


def texts(found: Scripted) -> list[tuple[list[int], str]]:
    return [(r["outputs"][0]["token_ids"], r["outputs"][0]["finish_reason"]) for r in found.results]


@pytest.mark.parametrize("script", ["oracle", "mixed", "none"])
def test_the_text_of_a_seed_is_plain_vllms_whatever_is_drafted(runs: Runs, script: str) -> None:
    plain, scripted, _ = runs
    assert texts(scripted[script]) == texts(plain["plain"])


def test_a_draft_that_knows_the_text_is_accepted(runs: Runs) -> None:
    _, scripted, _ = runs
    tokens = sum(len(text) for text, _ in texts(scripted["oracle"]))
    assert scripted["oracle"].accepted > 0.5 * tokens
    assert scripted["none"].accepted == 0


def test_the_text_of_a_seed_is_plain_vllms_with_a_real_draft(runs: Runs) -> None:
    plain, _, stream = runs
    assert texts(stream["guarded"]) == texts(plain["plain"])
    assert stream["guarded"].metrics["vllm:saguaro_hits"] > 20
    assert stream["guarded"].accepted > 20


def test_a_stale_table_costs_drafts_and_no_text(runs: Runs) -> None:
    plain, _, stream = runs
    assert texts(stream["stale"]) == texts(plain["plain"])
    assert stream["stale"].metrics["vllm:saguaro_hits"] > 20
    assert stream["stale"].accepted < 0.5 * stream["guarded"].accepted


def test_nothing_waits_on_the_host(runs: Runs) -> None:
    assert "synchronised" not in runs[2].answer
    assert runs[2]["guarded"].guard["propose"] > 10
    assert runs[2]["guarded"].guard["agreed"] > 10


def test_samples_without_a_seed_are_the_targets(runs: Runs) -> None:
    found = runs[2]["samples"]
    assert samples_p(found) > CHANCE
    assert found.accepted > SAMPLES
    assert found.metrics["vllm:saguaro_misses{cause=not_predicted}"] > 0


def test_a_draft_that_is_believed_would_be_seen(runs: Runs) -> None:
    plain, _, stream = runs
    wrong = [ours != theirs for ours, theirs in zip(texts(stream["believed"]), texts(plain["plain"]), strict=True)]
    assert sum(wrong) >= 4


@pytest.mark.long
def test_the_text_of_a_seed_is_plain_vllms_with_a_draft_process(runs: Runs, process: V2Run) -> None:
    assert texts(process["seeded"]) == texts(runs[0]["plain"])
    assert process["seeded"].metrics["vllm:saguaro_hits"] > 0
    assert process["seeded"].accepted > 0
