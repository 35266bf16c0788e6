from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from vllm_saguaro.benchmark.deepen import deepen


def make_source(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "draft").mkdir()
    (folder / "draft" / "config.json").write_text("{}")
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40).view(2, 20) * 7 % 97
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "dtype": "bfloat16"},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ],
)
def test_logits_are_exactly_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    source = make_source(tmp_path / "source", **changes)
    result = deepen(source, tmp_path / "deep", 7)
    assert json.loads((result / "config.json").read_text())["num_hidden_layers"] == 7
    assert LlamaForCausalLM.from_pretrained(result).model.layers[6].mlp.up_proj.weight.abs().sum() > 0
    assert torch.equal(logits_of(source), logits_of(result))


def test_copies_the_tokenizer_but_not_the_draft(tmp_path: Path) -> None:
    result = deepen(make_source(tmp_path / "source"), tmp_path / "deep", 3)
    assert (result / "tokenizer.json").exists()
    assert not (result / "draft").exists()


def test_reads_sharded_weights(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    result = deepen(source, tmp_path / "deep", 4)
    assert [path.name for path in result.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits_of(source), logits_of(result))


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    contents = [
        (deepen(source, tmp_path / name, 4, seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_refuses_fewer_layers_other_models_and_its_own_folder(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    with pytest.raises(ValueError, match="fewer"):
        deepen(source, tmp_path / "deep", 1)
    with pytest.raises(ValueError, match="another folder"):
        deepen(source, source, 4)
    (source / "config.json").write_text('{"model_type": "gpt2", "num_hidden_layers": 2}')
    with pytest.raises(ValueError, match="gpt2"):
        deepen(source, tmp_path / "deep", 4)
