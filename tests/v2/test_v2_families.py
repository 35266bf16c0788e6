"""Families of models under runner V2 with the draft on a stream: texts, and drafts by a draft that is the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.families import make
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, K, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.long]


@pytest.mark.parametrize("family", ["llama", "sliding", "sliding and full", "experts"])
def test_a_draft_that_is_the_target_agrees_with_it(family: str, tmp_path: Path) -> None:
    """Wrong KV of a branch shows here alone: the text is the target's whatever the draft says."""
    model = str(make(family, tmp_path / "model"))
    options = OPTIONS | {"model": model}
    draft = saguaro(placement="stream", branches=8, model=model, draft_sample_method="greedy")
    scenarios = [v2_plans.greedy("greedy")]
    plain, ours = run_v2(
        [
            {"options": options, "scripted": False, "scenarios": scenarios},
            {"options": options | draft, "scripted": False, "scenarios": scenarios},
        ]
    )
    found = ours["greedy"]
    assert found.tokens == plain["greedy"].tokens
    assert found.metrics["vllm:saguaro_hits"] > 0
    assert found.accepted > 0.9 * K * found.metrics["vllm:saguaro_hits"] * (1 - K / v2_plans.TOKENS)
