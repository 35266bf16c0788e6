"""Families of models under runner V2 with the draft on a stream: texts, and drafts by a draft that is the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.families import FAMILIES, make, quantise
from tests.v2 import v2_plans
from tests.v2.v2_runs import OPTIONS, K, Scripted, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.long]

MOST = K * (1 - K / v2_plans.TOKENS)
"""Drafts that can be accepted after a hit, of texts that end while there are drafts left."""


def run(target: Path, draft: Path, dtype: str = "float32") -> tuple[Scripted, Scripted]:
    """Plain vLLM, and ours."""
    options = OPTIONS | {"model": str(target), "dtype": dtype}
    drafts = saguaro(placement="stream", branches=8, model=str(draft), draft_sample_method="greedy")
    scenarios = [v2_plans.greedy("greedy")]
    plain, ours = run_v2(
        [
            {"options": options, "scripted": False, "scenarios": scenarios},
            {"options": options | drafts, "scripted": False, "scenarios": scenarios},
        ]
    )
    return plain["greedy"], ours["greedy"]


def accepted_after_a_hit(found: Scripted) -> float:
    hits = found.metrics["vllm:saguaro_hits"]
    assert hits > 0
    return found.accepted / hits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_that_is_the_target_agrees_with_it(family: str, tmp_path: Path) -> None:
    """Wrong KV of a branch shows here alone: the text is the target's whatever the draft says."""
    model = make(family, tmp_path / "model")
    plain, ours = run(model, model)
    assert ours.tokens == plain.tokens
    assert accepted_after_a_hit(ours) > 0.9 * MOST


@pytest.mark.parametrize("which", ["target", "draft", "both"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "awq"])
def test_a_quantised_target_and_a_quantised_draft(kind: str, which: str, tmp_path: Path) -> None:
    """Texts are mostly plain vLLM's where activations are rounded to 8 bits, and not compared in bfloat16.

    Both round by the shape of the batch. AWQ has 16-bit activations alone.
    """
    whole = make("llama", tmp_path / "whole")
    quantised = quantise(whole, tmp_path / "quantised", kind)
    target, draft = whole if which == "draft" else quantised, whole if which == "target" else quantised
    coarse = kind == "awq"
    plain, ours = run(target, draft, "bfloat16" if coarse else "float32")
    if not coarse:
        same = sum(one == other for one, other in zip(ours.tokens, plain.tokens, strict=True))
        assert same >= (len(plain.tokens) if which == "draft" else len(plain.tokens) / 2)
    most = (0.8 if coarse else 0.9) * MOST
    assert accepted_after_a_hit(ours) > (most if which == "both" else 0)


def test_bfloat16(tmp_path: Path) -> None:
    """Texts are not compared: bfloat16 rounds by the shape of the batch, and a verify pass has another one."""
    model = make("llama", tmp_path / "model")
    _, ours = run(model, model, "bfloat16")
    assert accepted_after_a_hit(ours) > 0.8 * MOST
