"""Families of models as target and as draft: texts, and drafts that are right, as a draft that is the target tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import plans
from tests.e2e.families import FAMILIES, make, quantise
from tests.e2e.harness import BASE, Json, Scenario, assert_same_texts, run_engines, saguaro

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

# The synchronous twin: every table is whole, so what is drafted depends on the draft's KV alone.
TWIN: Json = {"placement": "inline", "branches": 12, "backup": "none", "draft_sample_method": "greedy"}
K = 4


@dataclass(frozen=True)
class Pair:
    """Plain vLLM, and ours with a draft that is the target, or its origin before quantisation."""

    plain: Scenario
    ours: Scenario


def run(target: Path, draft: Path, dtype: str = "float32") -> Pair:
    options = BASE | {"model": str(target), "dtype": dtype}
    plan = plans.greedy(8, count=8)
    specs = [{"options": options, "scenarios": [plan]}]
    specs.append({"options": options | saguaro(**TWIN, model=str(draft)), "scenarios": [plan]})
    plain, ours = run_engines(specs)
    return Pair(plain[plan["name"]], ours[plan["name"]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_that_is_the_target_agrees_with_it(family: str, tmp_path: Path) -> None:
    """Wrong KV of a branch shows here alone: the text is the target's whatever the draft says."""
    model = make(family, tmp_path / "model")
    pair = run(model, model)
    assert_same_texts(pair.ours, pair.plain)
    assert pair.ours.hit_rate() > 0.8
    assert pair.ours.acceptance > 0.9 * K


def test_a_quantised_target_and_a_quantised_draft(tmp_path: Path) -> None:
    """Weights of 8 bits stand for FP8 and AWQ, for which a CPU has no kernels."""
    whole = make("llama", tmp_path / "whole")
    eight_bits = quantise(whole, tmp_path / "eight_bits")
    for target, draft, least in ((eight_bits, whole, 0.0), (whole, eight_bits, 0.0), (eight_bits, eight_bits, 0.9 * K)):
        pair = run(target, draft)
        assert_same_texts(pair.ours, pair.plain)
        assert pair.ours.hit_rate() > 0.5
        assert pair.ours.acceptance > least


def test_bfloat16(tmp_path: Path) -> None:
    model = make("llama", tmp_path / "model")
    pair = run(model, model, "bfloat16")
    assert pair.ours.hit_rate() > 0.8
    assert pair.ours.acceptance > 0.8 * K
