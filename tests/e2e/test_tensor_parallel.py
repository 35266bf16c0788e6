"""A target of two ranks: the first talks to the draft, and both have the same text, which is plain vLLM's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import plans
from tests.e2e.harness import (
    BASE,
    DRAFT,
    EngineRun,
    Json,
    Scenario,
    assert_same_texts,
    engines,
    is_gone_within,
    prompts,
    run_engines,
    saguaro,
)
from tests.e2e.shared_names import names_in_shared_memory
from tests.e2e.widened import widen

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = {"max_tokens": 32, "ignore_eos": True}


def greedy() -> Json:
    return plans.batches("greedy", list(prompts()[:8]), {**TOKENS, "logprobs": 2}, 8)


def seeded() -> Json:
    params: list[Json] = [{"temperature": 1.0, "seed": row, **TOKENS} for row in range(8)]
    params[1] |= {"top_k": 30, "presence_penalty": 0.5}
    return plans.batches("seeded", list(prompts()[8:16]), params, 8)


def sampled(name: str = "sampled", **more: bool) -> Json:
    """Rows without a seed, beside greedy and seeded ones."""
    params: list[Json] = [{"temperature": 1.0, **TOKENS} for _ in range(8)]
    params[2] |= {"temperature": 0.0}
    params[5] |= {"seed": 5}
    return plans.batches(name, list(prompts()[16:24]), params, 8, **more)


@dataclass(frozen=True)
class Engines:
    """Plain vLLM of two ranks, the twin of one rank, and two engines of ours of two ranks."""

    plain: EngineRun
    inline: EngineRun
    coupled: EngineRun
    probabilistic: EngineRun
    processes_gone: list[bool]
    memory_left: set[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    target: Path = widen(tmp_path_factory.mktemp("pair") / "target")
    one = BASE | {"model": str(target)}
    two = one | {"tensor_parallel_size": 2}
    ours: Json = {"model": str(DRAFT), "backup": "none", "adaptive": False}
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    # Plain vLLM divides cores among ranks only by memory nodes, or as it is told.
    plain = run_engines(
        [{"options": two, "scenarios": [greedy(), seeded()]}], VLLM_CPU_OMP_THREADS_BIND=f"{first}|{last}"
    )
    inline = run_engines(
        [{"options": one | saguaro(**ours, placement="inline", branches=12), "scenarios": [greedy()]}], cpus=[first]
    )
    probabilistic = saguaro(**ours, draft_sample_method="probabilistic")
    apart = [sampled("before"), sampled("sampled apart", sample_apart=True)]
    with (
        names_in_shared_memory() as names,
        engines(
            [
                {"options": two | saguaro(**ours), "scenarios": [greedy(), seeded()]},
                {"options": two | probabilistic, "scenarios": [greedy(), *apart]},
            ]
        ) as group,
    ):
        found, gone = [], []
        for _ in range(2):
            found.append(group.read_engine())
            answer = found[-1].answer
            gone += [is_gone_within(pid, 3) for pid in (answer["draft_pid"], *answer["rank_pids"])]
        assert group.process.wait(60) == 0, group.whole_log()[-6000:]
    return Engines(plain[0], inline[0], found[0], found[1], gone, names.left())


def at_odds(scenario: Scenario) -> list[str]:
    """Requests of which the ranks have different texts."""
    one, other = scenario.ranks
    assert one.keys() == other.keys()
    assert len(one) == len(scenario.results)
    return [request_id for request_id, tokens in one.items() if other[request_id] != tokens]


# ---- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_texts_are_those_of_plain_ranks(runs: Engines, name: str) -> None:
    assert_same_texts(runs.coupled[name], runs.plain[name])


def test_greedy_texts_are_plain_with_probabilistic_drafts_too(runs: Engines) -> None:
    assert_same_texts(runs.probabilistic["greedy"], runs.plain["greedy"])


def test_logprobs_are_those_of_the_rank_that_samples(runs: Engines) -> None:
    for ours, theirs in zip(runs.coupled["greedy"].results, runs.plain["greedy"].results, strict=True):
        found, expected = ours["outputs"][0]["gaps"], theirs["outputs"][0]["gaps"]
        assert found == pytest.approx(expected, abs=1e-3)


def test_all_ranks_have_the_text_that_is_returned(runs: Engines) -> None:
    for scenario in (*runs.coupled.scenarios.values(), runs.probabilistic["greedy"], runs.probabilistic["before"]):
        assert at_odds(scenario) == []
        for result in scenario.results:
            tokens = result["outputs"][0]["token_ids"]
            for texts in scenario.ranks:
                assert texts[result["request_id"]][result["prompt_length"] :][: len(tokens)] == tokens


def test_ranks_that_sample_apart_are_found_at_odds(runs: Engines) -> None:
    """The comparison above can fail: this is what it sees when each rank samples for itself and one knows q."""
    assert at_odds(runs.probabilistic["sampled apart"]) != []


# ---- the drafts -----------------------------------------------------------------------------------------------------


def test_drafts_are_verified_and_accepted(runs: Engines) -> None:
    for scenario in (*runs.coupled.scenarios.values(), runs.probabilistic["greedy"], runs.probabilistic["before"]):
        assert scenario.hits > 0
        accepted = scenario.metrics["vllm:spec_decode_num_accepted_tokens"]
        assert 0 < accepted < scenario.metrics["vllm:spec_decode_num_draft_tokens"]


def drafts_by_place(scenario: Scenario) -> dict[tuple[int, int], list[int]]:
    row = {result["request_id"]: number for number, result in enumerate(scenario.results)}
    return {(row[request_id], length): drafts for request_id, length, drafts in scenario.records if drafts}


def test_drafts_are_those_for_a_target_of_one_rank(runs: Engines) -> None:
    """The text is the same, so at the same place drafts must be the same, and so is their acceptance."""
    ours, theirs = drafts_by_place(runs.coupled["greedy"]), drafts_by_place(runs.inline["greedy"])
    places = ours.keys() & theirs.keys()
    assert len(places) > 30
    same = sum(all(x == y for x, y in zip(ours[place], theirs[place], strict=False)) for place in places)
    assert same >= 0.98 * len(places), f"{same} of {len(places)}"  # two likeliest may be a rounding error apart


# ---- ranks and processes --------------------------------------------------------------------------------------------


def test_one_rank_has_a_draft_and_all_have_as_many_blocks(runs: Engines) -> None:
    for run in (runs.coupled, runs.probabilistic):
        started, none = run.answer["drafts_of_ranks"]
        assert started == run.answer["draft_pid"] is not None
        assert none is None
        assert len(set(run.answer["blocks"])) == 1


def test_nothing_is_left(runs: Engines) -> None:
    assert runs.processes_gone == [True] * 6
    # vLLM's own ranks leave their communicator's segments, with us or without.
    assert {name for name in runs.memory_left if not name.startswith("vllm_dist_")} == set()
