"""A target of two ranks under an interpreted runner V2: the first has the draft, and both have its text and drafts."""

from __future__ import annotations

import os

import pytest

from tests.e2e.harness import DRAFT, Json, is_gone_within
from tests.e2e.widened import widen
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, K, Scripted, V2Run, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.long]  # as tests/e2e/test_tensor_parallel.py on V1


GREEDY, SAMPLED = v2_plans.greedy("greedy"), v2_plans.greedy_among_sampled("among sampled")
SEEDED = v2_plans.seeded("seeded")
PLACEMENTS = ["stream", "process"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The options of a target of two ranks."""
    return OPTIONS | {"model": str(widen(tmp_path_factory.mktemp("pair") / "target")), "tensor_parallel_size": 2}


def run(*specs: Json) -> list[V2Run]:
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    return run_v2(
        specs,
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{last}",
        TORCHDYNAMO_DISABLE="1",  # vLLM compiles a piece of the divided embedding always, for which no Triton is there
    )


def beside(two: Json, placement: str, scenarios: list[Json], **more: str) -> Json:
    """An engine with drafts."""
    options = two | saguaro(model=str(DRAFT), branches=8, placement=placement, **more)
    return {"options": options, "scripted": False, "async": True, "scenarios": scenarios}


@pytest.fixture(scope="module")
def plain_and_stream(two: Json) -> tuple[V2Run, V2Run]:
    apart = v2_plans.greedy_among_sampled("apart", apart=True)
    scenarios = [GREEDY, SAMPLED, SEEDED, v2_plans.processed("processed"), apart]
    plain, stream = run(
        {"options": two, "scripted": False, "scenarios": [GREEDY, SEEDED]}, beside(two, "stream", scenarios)
    )
    return plain, stream


@pytest.fixture(scope="module")
def plain(plain_and_stream: tuple[V2Run, V2Run]) -> V2Run:
    return plain_and_stream[0]


@pytest.fixture(scope="module")
def stream(plain_and_stream: tuple[V2Run, V2Run]) -> V2Run:
    return plain_and_stream[1]


@pytest.fixture(scope="module")
def process(two: Json) -> V2Run:
    return run(beside(two, "process", [GREEDY, SAMPLED, SEEDED]))[0]


@pytest.fixture(scope="module")
def with_q(two: Json) -> V2Run:
    """Drafts that are drawn from the draft's own q."""
    return run(beside(two, "stream", [GREEDY, SAMPLED], draft_sample_method="probabilistic"))[0]


@pytest.fixture(params=PLACEMENTS)
def ours(request: pytest.FixtureRequest) -> V2Run:
    return request.getfixturevalue(request.param)


def hit_rate(found: Scripted) -> float:
    hits = found.metrics["vllm:saguaro_hits"]
    return hits / (hits + found.metrics["vllm:saguaro_misses{cause=not_predicted}"])


def test_greedy_texts_are_those_of_plain_ranks(ours: V2Run, plain: V2Run) -> None:
    assert ours["greedy"].tokens == plain["greedy"].tokens
    assert ours["among sampled"].tokens[::2] == plain["greedy"].tokens[::2]


def test_texts_of_seeds_are_those_of_plain_ranks(ours: V2Run, plain: V2Run) -> None:
    assert ours["seeded"].tokens == plain["seeded"].tokens
    assert ours["seeded"].metrics["vllm:saguaro_hits"] > 0
    assert ours["seeded"].accepted > 0


def test_all_ranks_have_the_same_texts_and_drafts_after_each_step(ours: V2Run) -> None:
    for name in {"greedy", "among sampled", "seeded", "processed"} & ours.scenarios.keys():
        one, other = ours[name].ranks
        assert len(one) > 20
        assert one == other


def test_all_ranks_have_the_text_that_is_returned(ours: V2Run) -> None:
    for scenario in (ours["greedy"], ours["among sampled"], ours["seeded"]):
        for rank in scenario.ranks:
            texts = {request_id: text for request_id, text, _ in rank}
            for result in scenario.results:
                tokens = result["outputs"][0]["token_ids"]
                assert texts[result["request_id"]][result["prompt_length"] :][: len(tokens)] == tokens


def test_ranks_that_go_apart_are_found_at_odds(stream: V2Run) -> None:
    """The comparison above can fail: this is what it sees where one rank alone has the drafts."""
    one, other = stream["apart"].ranks
    assert one != other


def test_outcomes_are_hit_and_their_drafts_accepted(stream: V2Run) -> None:
    """A draft that were cut up, or had KV of another rank's, would agree with nothing."""
    found = stream["greedy"]
    assert hit_rate(found) > 0.5
    assert 1 < found.accepted / found.metrics["vllm:saguaro_hits"] <= K


def test_drafts_are_accepted(ours: V2Run) -> None:
    for name in ("greedy", "among sampled"):  # how many is chance: of the draws, or of what comes in time
        assert ours[name].metrics["vllm:saguaro_hits"] > 0
        assert ours[name].accepted > 0


def test_one_rank_has_a_draft_and_all_have_as_many_blocks(ours: V2Run) -> None:
    first, second = ours.answer["facts"]["ranks"]
    assert first["has a draft"]
    assert not second["has a draft"]
    assert first["blocks"] == second["blocks"]
    assert first["async"]
    assert {first["worker"], second["worker"]} == {"SaguaroV2CPUWorker"}


def test_the_first_rank_alone_has_q_where_drafts_are_drawn_from_it(stream: V2Run, with_q: V2Run, plain: V2Run) -> None:
    assert [rank["has q"] for rank in with_q.answer["facts"]["ranks"]] == [True, False]
    assert [rank["has q"] for rank in stream.answer["facts"]["ranks"]] == [False, False], "coupled drafts need none"
    assert with_q["greedy"].tokens == plain["greedy"].tokens
    one, other = with_q["among sampled"].ranks
    assert one == other
    assert with_q["among sampled"].accepted > 0


def test_nothing_is_left(ours: V2Run) -> None:
    assert all(is_gone_within(rank["pid"], 3) for rank in ours.answer["facts"]["ranks"])
