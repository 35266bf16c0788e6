from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.gpu_checking.shapes import PAIRS, Shape, check_fits, default_source, write_folder
from scripts.gpu_checking.widened import wide_weights

WIDE = Shape(layers=4, hidden=320, intermediate=448, heads=8, kv_heads=4, head_dim=128, vocabulary=4200)
"""Larger than the committed draft in every way."""


def logits(folder: Path, weights: dict[str, torch.Tensor] | None, tokens: torch.Tensor) -> torch.Tensor:
    if weights is None:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float()
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
        assert set(missing.missing_keys) <= {"lm_head.weight"}
        model.tie_weights()
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens).logits
    return found


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(0))


def test_a_widened_model_computes_what_its_source_does(tokens: torch.Tensor, tmp_path: Path) -> None:
    source = default_source("draft")
    folder = write_folder(source, WIDE, tmp_path)
    weights = dict(wide_weights(source, WIDE, torch.device("cpu"), torch.float32))
    expected, got = logits(source, None, tokens), logits(folder, weights, tokens)
    difference = (got[..., :4096] - expected) - (got[..., :4096] - expected).mean(-1, keepdim=True)
    assert difference.abs().max() < 2e-2
    assert (got[..., 4096:] < expected.min() - 50).all()


def test_what_is_silent_is_random_all_the_same(tmp_path: Path) -> None:
    weights = dict(wide_weights(default_source("draft"), WIDE, torch.device("cpu"), torch.bfloat16))
    assert weights["model.layers.3.mlp.gate_proj.weight"].float().std() > 0.01
    assert not weights["model.layers.3.mlp.down_proj.weight"].any()
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_every_pair_holds_the_committed_one() -> None:
    import json

    for pair in PAIRS.values():
        for part, shape in (("target", pair.target), ("draft", pair.draft)):
            config = json.loads((default_source(part) / "config.json").read_text(encoding="utf-8"))
            check_fits(Shape.of(config), shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 128}, "one channel is taken"),
        ({"layers": 1}, "layers 1 is less"),
        ({"head_dim": 96}, "no multiple"),
        ({"heads": 6}, "share"),
    ],
)
def test_a_shape_that_is_too_small_is_refused(change: dict[str, int], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        write_folder(default_source("draft"), replace(WIDE, **change), tmp_path)
