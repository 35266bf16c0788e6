"""The same through vLLM: real models, every way to draw drafts, requests without a seed.

(`tests/e2e/test_samples.py` has requests with a seed among others, and the draft in a process of its own.)
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.e2e import plans
from tests.e2e.exact import Contexts, first_token_p, rank_p, second_token_p
from tests.e2e.harness import BASE, EngineRun, Json, Scenario, run_engines, saguaro, tokenize

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

SMALLEST_P = 1e-5
SAMPLES, TOKENS = 768, 3

SETTINGS: dict[str, Json] = {
    "T=0.8": {"temperature": 0.8},
    "T=1.2": {"temperature": 1.2},
    "T=1, top_k=20": {"temperature": 1.0, "top_k": 20},
    "T=1.2, top_p=0.9": {"temperature": 1.2, "top_p": 0.9},
}
ENGINES: dict[str, Json] = {
    "coupled": {"draft_sample_method": "coupled", "placement": "inline"},
    "probabilistic": {"draft_sample_method": "probabilistic", "placement": "inline"},
    "probabilistic, C=0.3": {"draft_sample_method": "probabilistic", "placement": "inline", "sampling_c": 0.3},
    "probabilistic, just in time": {
        "draft_sample_method": "probabilistic",
        "placement": "process",
        "backup": "jit",
        "adaptive": False,
    },
    "greedy": {"draft_sample_method": "greedy", "placement": "inline"},
}


def samples(name: str) -> Json:
    params = {"n": SAMPLES, "max_tokens": TOKENS, "ignore_eos": True, **SETTINGS[name]}
    return plans.batches(name, [tokenize(plans.SAMPLED_PROMPT)], params, 1)


@pytest.fixture(scope="module")
def runs() -> dict[str, EngineRun]:
    """One process an engine, two at a time, each on a core of its own but for the one that has two processes."""
    scenarios = [samples(name) for name in SETTINGS]
    asked: dict[str, Json] = {
        name: {"options": BASE | saguaro(branches=8, **keys), "scenarios": scenarios} for name, keys in ENGINES.items()
    }
    asked["probabilistic, just in time"]["options"]["max_num_seqs"] = 1  # no row waits while another has hit
    cores = sorted(os.sched_getaffinity(0))
    alone = [name for name, keys in ENGINES.items() if keys["placement"] == "process"]
    beside = [name for name in ENGINES if name not in alone]
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(run_engines, [asked[name]], cpus=[cores[number % len(cores)]])
            for number, name in enumerate(beside)
        }
        found = {name: future.result()[0] for name, future in started.items()}
    return found | {name: run_engines([asked[name]])[0] for name in alone}


def outputs_of(scenario: Scenario) -> list[list[int]]:
    return [output["token_ids"] for output in scenario.results[0]["outputs"]]


def p_values(outputs: list[list[int]], params: Json) -> dict[str, float]:
    """(How often a draft is taken says nothing here: but for certain drafts it depends on the token that is drawn.)"""
    contexts, rng = Contexts(tokenize(plans.SAMPLED_PROMPT), outputs, params), np.random.default_rng(0)
    found = {"first token": first_token_p(outputs, contexts), "second token": second_token_p(outputs, contexts)}
    return found | {f"rank at {at}": rank_p(outputs, contexts, at, rng) for at in range(TOKENS)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_follow_the_targets_distribution(runs: dict[str, EngineRun], engine: str, setting: str) -> None:
    outputs = outputs_of(runs[engine][setting])
    assert len(outputs) == SAMPLES
    found = p_values(outputs, SETTINGS[setting])
    assert min(found.values()) > SMALLEST_P, found


@pytest.mark.parametrize("engine", ENGINES)
def test_drafts_were_verified_in_those_samples(runs: dict[str, EngineRun], engine: str) -> None:
    for setting in SETTINGS:
        scenario = runs[engine][setting]
        accepted = scenario.metrics["vllm:spec_decode_num_accepted_tokens"]
        assert SAMPLES / 40 < accepted < scenario.metrics["vllm:spec_decode_num_draft_tokens"]
        assert scenario.hits > SAMPLES / 20


def test_misses_got_drafts_just_in_time(runs: dict[str, EngineRun]) -> None:
    for setting in SETTINGS:
        assert runs["probabilistic, just in time"][setting].metrics["vllm:saguaro_backups{kind=jit}"] > SAMPLES / 20


@pytest.mark.parametrize("engine", ENGINES)
def test_it_would_see_another_temperature(runs: dict[str, EngineRun], engine: str) -> None:
    found = p_values(outputs_of(runs[engine]["T=0.8"]), SETTINGS["T=1.2"])
    assert min(found.values()) < SMALLEST_P / 100, found
