"""A target of two ranks under an interpreted runner V2: the first has the draft, and both have its text and drafts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from tests.e2e.harness import DRAFT, Json, is_gone_within
from tests.e2e.widened import widen
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, K, Scripted, V2Run, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@dataclass(frozen=True)
class Runs:
    """Plain vLLM of two ranks, and drafts beside it by placement."""

    plain: V2Run
    stream: V2Run
    process: V2Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    two = OPTIONS | {"model": str(widen(tmp_path_factory.mktemp("pair") / "target")), "tensor_parallel_size": 2}
    ours: Json = {"model": str(DRAFT), "branches": 8}
    greedy, sampled = v2_plans.greedy("greedy"), v2_plans.greedy_among_sampled("among sampled")
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    plain, stream, process = run_v2(
        [
            {"options": two, "scripted": False, "scenarios": [greedy]},
            {
                "options": two | saguaro(**ours, placement="stream"),
                "scripted": False,
                "async": True,
                "scenarios": [
                    greedy,
                    sampled,
                    v2_plans.processed("processed"),
                    v2_plans.greedy_among_sampled("apart", apart=True),
                ],
            },
            {
                "options": two | saguaro(**ours, placement="process"),
                "scripted": False,
                "async": True,
                "scenarios": [greedy, sampled],
            },
        ],
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{last}",
        TORCHDYNAMO_DISABLE="1",  # vLLM compiles a piece of the divided embedding always, for which no Triton is there
    )
    return Runs(plain, stream, process)


def scenarios(runs: Runs) -> list[Scripted]:
    return [run[name] for run in (runs.stream, runs.process) for name in ("greedy", "among sampled")]


def hit_rate(found: Scripted) -> float:
    hits = found.metrics["vllm:saguaro_hits"]
    return hits / (hits + found.metrics["vllm:saguaro_misses{cause=not_predicted}"])


def test_greedy_texts_are_those_of_plain_ranks(runs: Runs) -> None:
    for run in (runs.stream, runs.process):
        assert run["greedy"].tokens == runs.plain["greedy"].tokens
        assert run["among sampled"].tokens[::2] == runs.plain["greedy"].tokens[::2]


def test_all_ranks_have_the_same_texts_and_drafts_after_each_step(runs: Runs) -> None:
    for scenario in (*scenarios(runs), runs.stream["processed"]):
        one, other = scenario.ranks
        assert len(one) > 20
        assert one == other


def test_all_ranks_have_the_text_that_is_returned(runs: Runs) -> None:
    for scenario in scenarios(runs):
        for rank in scenario.ranks:
            texts = {request_id: text for request_id, text, _ in rank}
            for result in scenario.results:
                tokens = result["outputs"][0]["token_ids"]
                assert texts[result["request_id"]][result["prompt_length"] :][: len(tokens)] == tokens


def test_ranks_that_go_apart_are_found_at_odds(runs: Runs) -> None:
    """The comparison above can fail: this is what it sees where one rank alone has the drafts."""
    one, other = runs.stream["apart"].ranks
    assert one != other


def test_outcomes_are_hit_and_their_drafts_accepted(runs: Runs) -> None:
    """A draft that were cut up, or had KV of another rank's, would agree with nothing."""
    found = runs.stream["greedy"]
    assert hit_rate(found) > 0.5
    assert 1 < found.accepted / found.metrics["vllm:saguaro_hits"] <= K
    for other in (runs.stream["among sampled"], runs.process["greedy"], runs.process["among sampled"]):
        assert other.metrics["vllm:saguaro_hits"] > 0  # how many is chance: of the draws, or of what comes in time
        assert other.accepted > 0


def test_one_rank_has_a_draft_and_all_have_as_many_blocks(runs: Runs) -> None:
    for run in (runs.stream, runs.process):
        first, second = run.answer["facts"]["ranks"]
        assert first["has a draft"]
        assert first["has q"]
        assert not second["has a draft"]
        assert not second["has q"]
        assert first["blocks"] == second["blocks"]
        assert first["async"]
        assert {first["worker"], second["worker"]} == {"SaguaroV2CPUWorker"}


def test_nothing_is_left(runs: Runs) -> None:
    pids = [rank["pid"] for run in (runs.stream, runs.process) for rank in run.answer["facts"]["ranks"]]
    assert all(is_gone_within(pid, 3) for pid in pids)
