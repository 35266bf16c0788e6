"""A target of two ranks: the first talks to the draft, and both have the same text, which is plain vLLM's."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
class Ranks:
    """An engine of ours of two ranks, and what was left of it."""

    run: EngineRun
    processes_gone: list[bool]
    memory_left: set[str]

    @property
    def at_one(self) -> list[Scenario]:
        """The scenarios in which its ranks are not put at odds."""
        return [scenario for name, scenario in self.run.scenarios.items() if name != "sampled apart"]


OURS: Json = {"model": str(DRAFT), "backup": "none", "adaptive": False}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The options of the target on one rank."""
    return BASE | {"model": str(widen(tmp_path_factory.mktemp("pair") / "target"))}


def run_ranks(options: Json, scenarios: list[Json]) -> Ranks:
    spec = {"options": options | {"tensor_parallel_size": 2}, "scenarios": scenarios}
    with names_in_shared_memory() as names, engines([spec]) as group:
        run = group.read_engine()
        gone = [is_gone_within(pid, 3) for pid in (run.answer["draft_pid"], *run.answer["rank_pids"])]
        assert group.process.wait(60) == 0, group.whole_log()[-6000:]
    return Ranks(run, gone, names.left())


@pytest.fixture(scope="module")
def plain(one: Json) -> EngineRun:
    """Plain vLLM of two ranks. It divides cores among ranks only by memory nodes, or as it is told."""
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    spec = {"options": one | {"tensor_parallel_size": 2}, "scenarios": [greedy(), seeded()]}
    return run_engines([spec], VLLM_CPU_OMP_THREADS_BIND=f"{first}|{last}")[0]


@pytest.fixture(scope="module")
def inline(one: Json) -> EngineRun:
    """The twin of one rank."""
    options = one | saguaro(**OURS, placement="inline", branches=12)
    return run_engines([{"options": options, "scenarios": [greedy()]}], cpus=[min(os.sched_getaffinity(0))])[0]


@pytest.fixture(scope="module")
def coupled(one: Json) -> Ranks:
    return run_ranks(one | saguaro(**OURS), [greedy(), seeded(), sampled()])


@pytest.fixture(scope="module")
def probabilistic(one: Json) -> Ranks:
    apart = [sampled("before"), sampled("sampled apart", sample_apart=True)]
    return run_ranks(one | saguaro(**OURS, draft_sample_method="probabilistic"), [greedy(), *apart])


@pytest.fixture(params=["coupled", pytest.param("probabilistic", marks=pytest.mark.long)])
def ours(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue(request.param)


def at_odds(scenario: Scenario) -> list[str]:
    """Requests of which the ranks have different texts."""
    one, other = scenario.ranks
    assert one.keys() == other.keys()
    assert len(one) == len(scenario.results)
    return [request_id for request_id, tokens in one.items() if other[request_id] != tokens]


# ---- the text -------------------------------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_plain_ranks(ours: Ranks, plain: EngineRun) -> None:
    assert_same_texts(ours.run["greedy"], plain["greedy"])


def test_seeded_texts_are_those_of_plain_ranks(coupled: Ranks, plain: EngineRun) -> None:
    assert_same_texts(coupled.run["seeded"], plain["seeded"])


def test_logprobs_are_those_of_the_rank_that_samples(ours: Ranks, plain: EngineRun) -> None:
    for one, other in zip(ours.run["greedy"].results, plain["greedy"].results, strict=True):
        assert one["outputs"][0]["gaps"] == pytest.approx(other["outputs"][0]["gaps"], abs=1e-3)


def test_all_ranks_have_the_text_that_is_returned(ours: Ranks) -> None:
    for scenario in ours.at_one:
        assert at_odds(scenario) == []
        for result in scenario.results:
            tokens = result["outputs"][0]["token_ids"]
            for texts in scenario.ranks:
                assert texts[result["request_id"]][result["prompt_length"] :][: len(tokens)] == tokens


@pytest.mark.long
def test_ranks_that_sample_apart_are_found_at_odds(probabilistic: Ranks) -> None:
    """The comparison above can fail: this is what it sees when each rank samples for itself and one knows q."""
    assert at_odds(probabilistic.run["sampled apart"]) != []


# ---- the drafts -----------------------------------------------------------------------------------------------------


def test_drafts_are_verified_and_accepted(ours: Ranks) -> None:
    for scenario in ours.at_one:
        assert scenario.hits > 0
        accepted = scenario.metrics["vllm:spec_decode_num_accepted_tokens"]
        assert 0 < accepted < scenario.metrics["vllm:spec_decode_num_draft_tokens"]


def drafts_by_place(scenario: Scenario) -> dict[tuple[int, int], list[int]]:
    row = {result["request_id"]: number for number, result in enumerate(scenario.results)}
    return {(row[request_id], length): drafts for request_id, length, drafts in scenario.records if drafts}


def test_drafts_are_those_for_a_target_of_one_rank(ours: Ranks, inline: EngineRun) -> None:
    """The text is the same, so at the same place drafts must be the same, and so is their acceptance."""
    found, expected = drafts_by_place(ours.run["greedy"]), drafts_by_place(inline["greedy"])
    places = found.keys() & expected.keys()
    assert len(places) > 10, "how many tables are in time depends on what else the machine does"
    same = sum(all(x == y for x, y in zip(found[place], expected[place], strict=False)) for place in places)
    # Two likeliest may be a rounding error apart.
    assert len(places) - same <= max(1, 0.02 * len(places)), f"{same} of {len(places)}"


# ---- ranks and processes --------------------------------------------------------------------------------------------


def test_one_rank_has_a_draft_and_all_have_as_many_blocks(ours: Ranks) -> None:
    started, none = ours.run.answer["drafts_of_ranks"]
    assert started == ours.run.answer["draft_pid"] is not None
    assert none is None
    assert len(set(ours.run.answer["blocks"])) == 1


def test_nothing_is_left(ours: Ranks) -> None:
    assert ours.processes_gone == [True] * 3
    # vLLM's own ranks leave their communicator's segments, with us or without.
    assert {name for name in ours.memory_left if not name.startswith("vllm_dist_")} == set()
