"""At temperature > 0 the tokens are drawn from the target's own distribution, whatever the draft proposed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.e2e import plans
from tests.e2e.conftest import Inline, Process
from tests.e2e.exact import Contexts, all_p
from tests.e2e.harness import Scenario, tokenize

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SMALLEST_P = 1e-4
DRAWN_AGAIN = 8
VARIANTS = list(plans.VARIANTS)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def scenario(request: pytest.FixtureRequest, variant: str) -> Scenario:
    if "top_k" in variant:
        return request.getfixturevalue("only_top_k")[variant]
    inline: Inline = request.getfixturevalue("inline")
    return inline.default[variant]


def samples_of(scenario: Scenario) -> list[list[int]]:
    return [output["token_ids"] for output in scenario.results[0]["outputs"]]


def handed_over(scenario: Scenario) -> list[list[int]]:
    """The drafts that followed the first token of each sample; [] after a miss."""
    at = scenario.results[0]["prompt_length"] + 1
    # vLLM calls the outputs of one request 0_ID, 1_ID, ...
    found = {int(name.split("_")[0]): drafts for name, length, drafts in scenario.records if length == at}
    return [found[number] for number in range(len(found))]


@cache
def contexts_of(samples: tuple[tuple[int, ...], ...], variant: str) -> Contexts:
    return Contexts(tokenize(plans.SAMPLED_PROMPT), samples, plans.VARIANTS[variant])


def contexts(samples: list[list[int]], variant: str) -> Contexts:
    return contexts_of(tuple(map(tuple, samples)), variant)


def test_samples_follow_the_targets_distribution(scenario: Scenario, variant: str) -> None:
    samples = samples_of(scenario)
    assert len(samples) == plans.SAMPLES
    assert {len(sample) for sample in samples} == {plans.SAMPLED_TOKENS}
    found = all_p(samples, handed_over(scenario), contexts(samples, variant))
    assert min(found.values()) > SMALLEST_P, found


def test_drafts_were_verified_in_those_samples(scenario: Scenario) -> None:
    assert scenario.hits > plans.SAMPLES / 20
    assert scenario.metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    assert (
        scenario.metrics["vllm:spec_decode_num_accepted_tokens"] < scenario.metrics["vllm:spec_decode_num_draft_tokens"]
    )


def test_samples_with_the_draft_in_a_process(process: Process) -> None:
    """What is ready in time differs from run to run, and so do these samples: hence the smaller bound."""
    scenario = process.default["T=0.8"]
    samples = samples_of(scenario)
    found = all_p(samples, handed_over(scenario), contexts(samples, "T=0.8"))
    del found["draft taken"]  # these drafts know the noise that the target will draw with
    assert min(found.values()) > SMALLEST_P / 100, found
    assert scenario.hits > 0


# ---- the test can fail ----------------------------------------------------------------------------------------------


def test_it_would_see_another_temperature(scenario: Scenario, variant: str) -> None:
    samples = samples_of(scenario)
    wrong = plans.VARIANTS[variant] | {"temperature": 2.0 - plans.VARIANTS[variant]["temperature"]}
    found = all_p(samples, handed_over(scenario), Contexts(tokenize(plans.SAMPLED_PROMPT), samples, wrong))
    assert min(found.values()) < SMALLEST_P / 100, found


def test_it_would_see_drafts_that_are_always_accepted(inline: Inline) -> None:
    scenario = inline.default["T=0.8"]
    forged = [
        [*sample[:1], *drafts[: plans.SAMPLED_TOKENS - 1], *sample[1 + len(drafts) :]]
        for sample, drafts in zip(samples_of(scenario), handed_over(scenario), strict=True)
    ]
    found = all_p(forged, handed_over(scenario), contexts(forged, "T=0.8"))
    assert min(found.values()) < SMALLEST_P / 100, found


def test_it_would_see_a_rejected_draft_drawn_again(inline: Inline) -> None:
    """A verifier that draws from p, not from p without the draft, after a rejection.

    Only rows with drafts can show it, and how many those are is the engine's affair: each is drawn for several times.
    """
    scenario = inline.default["T=0.8"]
    rng = np.random.default_rng(5)
    samples, handed = samples_of(scenario) * DRAWN_AGAIN, handed_over(scenario) * DRAWN_AGAIN
    exact = contexts(samples_of(scenario), "T=0.8")
    forged = []
    for sample, drafts in zip(samples, handed, strict=True):
        p = exact[sample[:1]]
        second = sample[1]
        if drafts:
            accepted = rng.random() < p[drafts[0]]
            second = drafts[0] if accepted else int(rng.choice(len(p), p=p / p.sum()))
        forged.append([sample[0], second])
    found = all_p(forged, handed, exact)
    assert found["draft taken"] < SMALLEST_P / 100, found


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_the_same_seeds_give_the_same_texts(inline: Inline) -> None:
    first, second = inline.default["seeds"], inline.default["the same seeds"]
    assert first.tokens == second.tokens
    assert min(first.hits, second.hits) > 0  # not equal: the predictions have learnt in between


def test_other_seeds_give_other_texts(inline: Inline) -> None:
    assert len({tuple(tokens) for tokens in inline.default["seeds"].tokens}) == 12
