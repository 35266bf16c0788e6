"""`placement: process` under an interpreted runner V2: a draft process whose tables the target's side reads itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, V2Run, assert_same_arrivals, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trace."""
    return tmp_path_factory.mktemp("trace") / "trace.json"


@pytest.fixture(scope="module")
def runs(path: Path) -> tuple[V2Run, V2Run]:
    """Plain vLLM; and ours, a step ahead of what it knows, with a trace."""
    ours = [
        v2_plans.greedy("greedy"),
        v2_plans.greedy_among_sampled("among sampled"),
        v2_plans.structured("structured"),
        v2_plans.greedy("guarded", guarded=True),
    ]
    plain, beside = run_v2(
        [
            {"options": OPTIONS, "scripted": False, "scenarios": [v2_plans.greedy("greedy")]},
            {
                "options": OPTIONS | saguaro(placement="process", branches=8, trace=str(path)),
                "scripted": False,
                "async": True,
                "scenarios": ours,
            },
        ]
    )
    return plain, beside


@pytest.fixture(scope="module")
def ragged_runs() -> tuple[V2Run, V2Run]:
    """Plain vLLM; and ours a step ahead, where requests come and go and drafts are drawn from their own q."""
    ragged = OPTIONS | v2_plans.RAGGED
    ours = saguaro(
        placement="process",
        branches=8,
        max_model_len=v2_plans.LONGEST_DRAFT,
        draft_sample_method="probabilistic",
    )
    plain, beside = run_v2(
        [
            {"options": ragged, "scripted": False, "scenarios": [v2_plans.ragged("ragged", sampled=False)]},
            {
                "options": ragged | ours,
                "scripted": False,
                "async": True,
                "scenarios": [
                    v2_plans.ragged("ragged", sampled=False),
                    v2_plans.greedy_among_sampled("guarded, sampled", guarded=True),
                ],
            },
        ]
    )
    return plain, beside


def test_texts_are_those_of_plain_vllm(runs: tuple[V2Run, V2Run]) -> None:
    plain, ours = runs
    assert ours["greedy"].tokens == plain["greedy"].tokens
    assert ours["among sampled"].tokens[::2] == plain["greedy"].tokens[::2]
    assert ours["guarded"].tokens == plain["greedy"].tokens
    assert [result["outputs"][0]["text"] for result in ours["structured"].results] == ["return self"] * 2


def test_tables_arrive_and_their_drafts_are_accepted(runs: tuple[V2Run, V2Run]) -> None:
    for name in ("greedy", "among sampled"):
        assert runs[1][name].metrics["vllm:saguaro_hits"] > 0
        assert runs[1][name].accepted > 0


def test_nothing_waits_on_the_host(runs: tuple[V2Run, V2Run]) -> None:
    assert "synchronised" not in runs[1].answer
    assert runs[1]["guarded"].guard["propose"] > 5
    assert runs[1]["guarded"].guard["steps"] > 10


def test_the_trace_has_what_the_host_knows(runs: tuple[V2Run, V2Run], path: Path) -> None:
    """Of an engine that ended without closing it: whole all the same."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line.removesuffix(",")) for line in lines]
    assert first == "["
    steps = [event["args"] for event in events if event["name"] == "enqueue"]
    assert [args["step"] for args in steps] == list(range(1, len(steps) + 1))
    assert max(args["verifying"] for args in steps) > 0
    found = sum(event["args"]["hits"] for event in events if event["name"] == "outcomes")
    assert 0 < found <= sum(one.metrics["vllm:saguaro_hits"] for one in runs[1].scenarios.values())
    rounds = [event for event in events if event["name"] == "round"]
    assert rounds
    assert {event["pid"] for event in rounds} == {2}
    assert max(event["args"]["branches"] for event in rounds) == 8
    assert [event["pid"] for event in events if event["name"] == "draft up"] == [2]


@pytest.mark.long
def test_requests_that_come_and_go_keep_their_texts(ragged_runs: tuple[V2Run, V2Run]) -> None:
    plain, ours = ragged_runs
    assert_same_arrivals(ours["ragged"], plain["ragged"])
    assert ours["ragged"].metrics["vllm:saguaro_hits"] > 0
    assert ours["ragged"].metrics["vllm:prefix_cache_hits"] > 0
    assert ours["ragged"].metrics["vllm:num_preemptions"] > 0
    assert ours.answer["facts"]["async"]


@pytest.mark.long
def test_nothing_waits_on_the_host_where_drafts_have_a_q(ragged_runs: tuple[V2Run, V2Run]) -> None:
    _, ours = ragged_runs
    assert ours.answer["facts"]["draft_logits"]
    assert "synchronised" not in ours.answer
    assert ours["guarded, sampled"].guard["propose"] > 5
    assert ours["guarded, sampled"].accepted > 0


@pytest.mark.long
def test_a_draft_in_an_actor_of_ray_is_read_alike(runs: tuple[V2Run, V2Run]) -> None:
    pytest.importorskip("ray")
    options = OPTIONS | saguaro(placement="ray", branches=8)
    (ours,) = run_v2([{"options": options, "scripted": False, "async": True, "scenarios": [v2_plans.greedy("greedy")]}])
    assert ours.answer["facts"]["async"]
    assert ours["greedy"].tokens == runs[0]["greedy"].tokens
    assert ours["greedy"].metrics["vllm:saguaro_hits"] > 0
    assert ours["greedy"].accepted > 0


@pytest.mark.long
def test_two_engines_have_one_draft_of_a_pool(runs: tuple[V2Run, V2Run]) -> None:
    pytest.importorskip("ray")
    from tests.e2e.ray_nodes import ray_nodes

    with ray_nodes({"num_cpus": 1}) as cluster:  # a second draft would have no core
        pool = saguaro(placement="ray", branches=8, draft_pool="v2", ray_options={"address": cluster.address})
        spec = {"options": OPTIONS | pool, "scripted": False, "async": True, "scenarios": [v2_plans.greedy("greedy")]}
        with ThreadPoolExecutor(2) as both:
            engines = list(both.map(lambda _: run_v2([spec])[0], range(2)))
    for ours in engines:
        assert ours["greedy"].tokens == runs[0]["greedy"].tokens
        assert ours["greedy"].metrics["vllm:saguaro_hits"] > 0
        assert ours["greedy"].accepted > 0
