"""Everything a request may ask of its sampling, feature by feature: plain vLLM's tokens, log-probabilities and ends."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e import plans
from tests.e2e.harness import (
    BASE,
    EngineRun,
    Json,
    assert_same_texts,
    compare,
    prompts,
    run_engines,
    saguaro,
    text_of,
    tokenize,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

K = 4
DRAFT_LIMIT = 160
"""The draft's own maximum length here, so that one engine has requests on both sides of it."""
SHORT = [prompt for prompt in prompts() if len(tokenize(prompt)) <= 100]
NEWLINE, EQUALS = tokenize("\n")[0], tokenize(" =")[0]


def asks(name: str, params: list[Json], batch: int | None = None, first: int = 0) -> Json:
    """One prompt for each of `params`, which fit the draft with their texts."""
    each = [{"max_tokens": 40, "ignore_eos": True} | one for one in params]
    return plans.batches(name, SHORT[first : first + len(each)], each, batch or len(each))


# ---- what decides the text ------------------------------------------------------------------------------------------

GREEDY: dict[str, list[Json]] = {
    "presence": [{"presence_penalty": 1.5}] * 4,
    "frequency": [{"frequency_penalty": 0.7}] * 4,
    "repetition": [{"repetition_penalty": 1.4}] * 4,
    "logit bias": [{"logit_bias": {NEWLINE: -100.0, EQUALS: 4.0}}, {"logit_bias": {NEWLINE: 5.0}}] * 2,
    "bad words": [{"bad_words": ["self", "self.", "return None"]}, {"bad_words": ["if not", "for"]}] * 4,
    "allowed tokens": [{"allowed_token_ids": list(range(5, 4096, 2))}] * 4,
    "min tokens": [{"min_tokens": 20, "stop_token_ids": list(range(0, 4096, 3))}] * 8,
    "min tokens, strings": [{"min_tokens": 20, "stop": ["\n", "."]}] * 4,
    "stop strings": [{"stop": ["):", "self"]}, {"stop": ["\n"], "include_stop_str_in_output": True}] * 2,
    "stop tokens": [{"stop_token_ids": [NEWLINE, *tokenize("):")]}] * 8,
}
"""Greedy requests that plain vLLM answers with other tokens, or fewer, than the same request without the feature."""

ALL_BUT_ONE: dict[str, list[Json]] = {
    "top_k": [{"temperature": 1.0, "top_k": 1}] * 4,
    "top_p": [{"temperature": 1.0, "top_p": 1e-6}] * 4,
    "min_p": [{"temperature": 1.0, "min_p": 1.0}] * 4,
    "min_p and bias": [{"temperature": 1.0, "min_p": 1.0, "logit_bias": {NEWLINE: -100.0}}] * 4,
}
"""Sampling from what is left when the likeliest token alone is: one text is possible."""

SEEDS: list[Json] = [
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.2, "seed": 8, "top_k": 20},
    {"temperature": 1.2, "seed": 9, "top_p": 0.8},
    {"temperature": 1.2, "seed": 10, "min_p": 0.1},
    {"temperature": 1.0, "seed": 11, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 12, "logit_bias": {NEWLINE: -100.0}, "presence_penalty": 0.5},
]
MATES: list[Json] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "seed": 7}, {"repetition_penalty": 1.3}]


def among_others() -> Json:
    """The seeded requests again, first in a batch with others that differ in everything."""
    each = [*SEEDS, *MATES, *MATES]
    return asks("seeds among others", each)


# ---- log-probabilities ----------------------------------------------------------------------------------------------

LOGPROBS: dict[str, list[Json]] = {
    "logprobs": [{"logprobs": 5}, {"logprobs": 1}, {"logprobs": 0}, {}],
    "logprobs of changed logits": [
        {"logprobs": 5, "repetition_penalty": 1.4},
        {"logprobs": 3, "presence_penalty": 1.0},
        {"logprobs": 2, "allowed_token_ids": list(range(5, 4096, 2))},
        {"logprobs": 4, "bad_words": ["self", "None"]},
    ],
    "logprobs of biased logits": [{"logprobs": 5, "logit_bias": {NEWLINE: -100.0, EQUALS: 4.0}}] * 2,
    "logprobs of the likeliest": [{"logprobs": 5, "temperature": 1.3, "top_k": 1}] * 2,
    "logprobs of samples": [
        {"logprobs": 5, "temperature": 0.7, "seed": 3},
        {"logprobs": 5, "temperature": 0.7, "seed": 4, "top_p": 0.8},
        {"logprobs": 5, "temperature": 0.7, "seed": 5, "top_k": 8},
        {"logprobs": 5, "temperature": 0.7, "seed": 6, "min_p": 0.05},
    ],
    "prompt logprobs": [{"prompt_logprobs": 3}, {"prompt_logprobs": 0}, {"prompt_logprobs": 1, "logprobs": 2}, {}],
}


# ---- lengths --------------------------------------------------------------------------------------------------------

LENGTHS = (40, 60, 150, DRAFT_LIMIT - K - 1, DRAFT_LIMIT - K, DRAFT_LIMIT, DRAFT_LIMIT + 1, 300)


def lengths() -> Json:
    asked = [text_of(100 + 400 * row, length) for row, length in enumerate(LENGTHS)]
    return plans.batches("lengths", asked, {"max_tokens": 40, "ignore_eos": True}, len(asked))


# ---- the engines ----------------------------------------------------------------------------------------------------


def scenarios() -> list[Json]:
    return [
        asks("nothing", [{}] * 8),
        *(asks(name, params) for name, params in (GREEDY | ALL_BUT_ONE | LOGPROBS).items()),
        asks("n=3", [{"temperature": 0.8, "n": 3, "seed": 11}] * 3),
        asks("seeds", SEEDS),
        asks("seeds alone", SEEDS, batch=1),
        among_others(),
        lengths(),
    ]


PROCESSED: Json = {"logprobs_mode": "processed_logprobs"}


def engines_with(options: Json, modes: tuple[Json, ...] = ({}, PROCESSED)) -> list[Json]:
    wanted = [scenarios(), [asks(name, params) for name, params in LOGPROBS.items()]]
    return [{"options": BASE | options | mode, "scenarios": asked} for mode, asked in zip(modes, wanted, strict=False)]


@pytest.fixture(scope="module")
def runs() -> dict[str, EngineRun]:
    """Plain vLLM and the twin on a core each; raw and processed scores."""
    first, *_, last = [*sorted(os.sched_getaffinity(0))] * 2
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        plain = one.submit(run_engines, engines_with({}), [first])
        twin = saguaro(placement="inline", branches=6, max_model_len=DRAFT_LIMIT)  # it drafts on the target's time
        inline = other.submit(run_engines, engines_with(twin), [last])
        found = dict(zip(("plain", "plain, processed"), plain.result(), strict=True))
        found |= dict(zip(("inline", "inline, processed"), inline.result(), strict=True))
    return found


@pytest.fixture(scope="module")
def in_a_process() -> EngineRun:
    """The same with the draft in a process; tests/e2e/test_greedy.py and test_lora.py have both every time."""
    return run_engines(engines_with(saguaro(max_model_len=DRAFT_LIMIT, adaptive=False), ({},)))[0]


PROCESS = pytest.param("process", marks=pytest.mark.long)


def of_placement(request: pytest.FixtureRequest, placement: str) -> EngineRun:
    if placement == "process":
        return request.getfixturevalue("in_a_process")
    return request.getfixturevalue("runs")[placement]


@pytest.fixture(params=["inline", PROCESS])
def ours(request: pytest.FixtureRequest) -> EngineRun:
    return of_placement(request, request.param)


@pytest.fixture
def plain(runs: dict[str, EngineRun]) -> EngineRun:
    return runs["plain"]


def assert_drafts_were_verified(run: EngineRun, name: str) -> None:
    """Otherwise the comparison would say nothing of what is done at the drafts' positions.

    In each scenario by the twin; by a draft in a process in all together, since on a busy machine each of the few
    tables of one may be late.
    """
    in_a_process = run.answer["draft_pid"] is not None
    scenarios = run.scenarios.values() if in_a_process else [run[name]]
    accepted, drafted = (
        sum(one.metrics[f"vllm:spec_decode_num_{what}_tokens"] for one in scenarios) for what in ("accepted", "draft")
    )
    assert 0 < accepted < drafted


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GREEDY, *ALL_BUT_ONE])
def test_the_text_is_plain(ours: EngineRun, plain: EngineRun, name: str) -> None:
    assert_same_texts(ours[name], plain[name])
    assert_drafts_were_verified(ours, name)


@pytest.mark.parametrize("name", GREEDY)
def test_the_feature_decides_the_text(plain: EngineRun, name: str) -> None:
    """So that a feature that is left out somewhere would show."""
    without = plain["nothing"].tokens
    assert any(found != without[row] for row, found in enumerate(plain[name].tokens))


@pytest.mark.parametrize("name", [name for name in ALL_BUT_ONE if "bias" not in name])
def test_sampling_the_likeliest_is_greedy(plain: EngineRun, name: str) -> None:
    assert plain[name].tokens == plain["nothing"].tokens[:4]


def test_min_tokens_holds_and_stops_come_after_it(ours: EngineRun) -> None:
    outputs = [result["outputs"][0] for result in ours["min tokens"].results]
    assert all(len(output["token_ids"]) > 20 for output in outputs)
    assert all(output["finish_reason"] == "stop" for output in outputs)


def test_no_bad_word_comes_out(ours: EngineRun) -> None:
    for params, result in zip(GREEDY["bad words"], ours["bad words"].results, strict=True):
        tokens = result["outputs"][0]["token_ids"]
        for word in map(tokenize, params["bad_words"]):
            assert not any(tokens[at : at + len(word)] == word for at in range(len(tokens))), tokens


# ---- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seeds", "seeds alone", "n=3"])
def test_a_seed_gives_the_plain_text(ours: EngineRun, plain: EngineRun, name: str) -> None:
    assert_same_texts(ours[name], plain[name])
    assert_drafts_were_verified(ours, name)


def test_a_seed_gives_the_plain_text_whatever_the_batch_mates(ours: EngineRun, plain: EngineRun) -> None:
    assert ours["seeds among others"].tokens[: len(SEEDS)] == plain["seeds alone"].tokens
    assert_drafts_were_verified(ours, "seeds among others")


def test_a_seed_samples(plain: EngineRun) -> None:
    """And the outputs of one request are samples of their own."""
    assert all(found != greedy for found, greedy in zip(plain["seeds"].tokens, plain["nothing"].tokens, strict=False))
    for result in plain["n=3"].results:
        assert len({tuple(output["token_ids"]) for output in result["outputs"]}) == 3


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def assert_same_scores(name: str, ours: Any, theirs: Any) -> None:
    """Position by position: the same tokens, at the same ranks, within 1e-3."""
    assert (ours is None) == (theirs is None), name
    if ours is None:
        return
    assert len(ours) == len(theirs), name
    for at, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys(), f"{name}, position {at}"
        for token in a:
            (score, rank), (expected, expected_rank) = a[token], b[token]
            assert rank == expected_rank, f"{name}, position {at}, token {token}"
            near = score == expected or math.isclose(score, expected, rel_tol=0, abs_tol=1e-3)
            assert near, f"{name}, position {at}, token {token}: {score} for {expected}"


@pytest.mark.parametrize("placement", ["inline", "inline, processed", PROCESS])
@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probabilities_are_plain(
    request: pytest.FixtureRequest, runs: dict[str, EngineRun], placement: str, name: str
) -> None:
    run = of_placement(request, placement)
    found = run[name]
    expected = runs["plain, processed" if "processed" in placement else "plain"][name]
    assert_same_texts(found, expected)
    assert_drafts_were_verified(run, name)
    for row, (a, b) in enumerate(zip(found.results, expected.results, strict=True)):
        assert_same_scores(f"row {row}", a["outputs"][0]["logprobs"], b["outputs"][0]["logprobs"])
        assert_same_scores(f"row {row}, prompt", a["prompt_logprobs"], b["prompt_logprobs"])


def test_log_probabilities_are_those_asked_for(ours: EngineRun) -> None:
    """The sampled token, and the n likeliest."""
    first, second, none, unasked = (result["outputs"][0]["logprobs"] for result in ours["logprobs"].results)
    assert {len(position) for position in first} == {5}
    assert {len(position) for position in second} == {len(position) for position in none} == {1}
    assert unasked is None
    prompt = ours["prompt logprobs"].results[0]
    assert len(prompt["prompt_logprobs"]) == prompt["prompt_length"]
    assert {len(position) for position in prompt["prompt_logprobs"][1:]} <= {3, 4}


@pytest.mark.parametrize("name", ["logprobs of changed logits", "logprobs of samples"])
def test_the_two_modes_differ(runs: dict[str, EngineRun], name: str) -> None:
    """So that one that is taken for the other would show."""
    raw, processed = (
        [result["outputs"][0]["logprobs"] for result in runs[run][name].results]
        for run in ("plain", "plain, processed")
    )
    assert all(a != b for a, b in zip(raw, processed, strict=True))


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_texts_past_the_drafts_limit_are_plain(ours: EngineRun, plain: EngineRun) -> None:
    complaints = []
    for length, a, b in zip(LENGTHS, ours["lengths"].results, plain["lengths"].results, strict=True):
        complaints += compare(f"prompt of {length}", a["outputs"][0], b["outputs"][0])
    assert not complaints, "\n".join(complaints)


def test_a_request_past_the_drafts_limit_stops_drafting_alone(ours: EngineRun) -> None:
    scenario = ours["lengths"]
    drafted: dict[str, list[int]] = {result["request_id"]: [] for result in scenario.results}
    for request_id, length, drafts in scenario.records:
        if drafts:
            drafted[request_id].append(length)
    for result in scenario.results:
        start, lengths = result["prompt_length"], drafted[result["request_id"]]
        fits = start + 1 <= DRAFT_LIMIT - K - 1
        assert bool(lengths) == fits, f"prompt of {start}: drafts at {lengths}"
        assert all(length <= DRAFT_LIMIT - K - 1 for length in lengths), f"prompt of {start}: drafts at {lengths}"
    for result in scenario.results[:2]:  # short ones go on to their end beside them
        assert drafted[result["request_id"]][-1] > result["prompt_length"] + 40 - 2 * (K + 1)


def test_the_drafts_limit_is_told_once(ours: EngineRun) -> None:
    assert len(ours.log_lines("longer than the draft model can hold")) == 1
