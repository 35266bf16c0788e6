"""At a temperature the samples are the target's, with drafts that are drawn and filler among them; errors are seen."""

from __future__ import annotations

import numpy as np
import pytest

from tests.e2e.exact import Contexts, rank_p
from tests.v2 import v2_plans
from tests.v2.v2_runs import V2Run

pytestmark = [pytest.mark.slow, pytest.mark.engine]

CHANCE = 1e-3
"""How unlikely samples must be to be wrong."""


def samples_p(run: V2Run, name: str) -> float:
    """Of all tokens but the first, which no draft has touched, together."""
    samples = run[name].tokens
    contexts = Contexts(v2_plans.SAMPLED_PROMPT, samples, v2_plans.SAMPLED)
    return rank_p(samples, contexts, range(1, len(samples[0])), np.random.default_rng(0))


def test_samples_are_the_targets(sampled: V2Run) -> None:
    assert sampled["drawn"].accepted > 60
    assert sampled["drawn"].metrics["vllm:saguaro_misses{cause=not_predicted}"] > 0
    assert samples_p(sampled, "drawn") > CHANCE


@pytest.mark.parametrize("error", ["lie", "unmarked"])
def test_a_planted_error_is_seen(sampled: V2Run, error: str) -> None:
    assert samples_p(sampled, error) < CHANCE


@pytest.mark.long
@pytest.mark.parametrize("error", ["stale", "marked one late"])
def test_a_planted_delay_is_seen(sampled_late: V2Run, error: str) -> None:
    assert samples_p(sampled_late, error) < CHANCE
