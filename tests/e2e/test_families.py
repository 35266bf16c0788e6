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


@pytest.mark.parametrize("kind", ["int8", "fp8", "awq"])
def test_a_quantised_target_and_a_quantised_draft(kind: str, tmp_path: Path) -> None:
    """Texts are mostly plain vLLM's where activations are rounded to 8 bits, and not compared in bfloat16.

    Both round by the shape of the batch, and a verify pass has another one: plain vLLM gives some texts of the model
    with 8-bit integers otherwise alone than in a batch. AWQ has 16-bit activations alone.
    """
    whole = make("llama", tmp_path / "whole")
    quantised = quantise(whole, tmp_path / "quantised", kind)
    coarse = kind == "awq"
    dtype, most = ("bfloat16", 0.8 * K) if coarse else ("float32", 0.9 * K)
    for target, draft, least in ((quantised, whole, 0.0), (whole, quantised, 0.0), (quantised, quantised, most)):
        pair = run(target, draft, dtype)
        if not coarse:
            assert same_texts(pair.ours, pair.plain) >= (8 if target == whole else 5)
        assert pair.ours.hit_rate() > (0.2 if coarse and not least else 0.5)
        assert pair.ours.acceptance > least


def same_texts(one: Scenario, other: Scenario) -> int:
    """How many of the eight."""
    texts = ([result["outputs"][0]["token_ids"] for result in found.results] for found in (one, other))
    return sum(ours == theirs for ours, theirs in zip(*texts, strict=True))


def test_bfloat16(tmp_path: Path) -> None:
    """Texts are not compared: bfloat16 rounds by the shape of the batch, and a verify pass has another one."""
    model = make("llama", tmp_path / "model")
    pair = run(model, model, "bfloat16")
    assert pair.ours.hit_rate() > 0.8
    assert pair.ours.acceptance > 0.8 * K
