"""Small random models of other families, by configuration: each can be a target, and its own draft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.harness import TARGET

VOCABULARY = 4096
WINDOW = 32
"""Tokens that a sliding layer looks back: fewer than the texts are long."""
SPREAD = 0.2
"""Of the weights: far from uniform logits, so that a wrong entry of the KV shows in what is likeliest."""

_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": SPREAD,
}
_TWO_KV_HEADS = {"num_key_value_heads": 2, "head_dim": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SHAPE, **_TWO_KV_HEADS))


def _sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SHAPE, **_TWO_KV_HEADS, sliding_window=WINDOW))


def _sliding_and_full() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_key_value_heads": 1, "head_dim": 64, "sliding_window": WINDOW, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE, **more, query_pre_attn_scalar=64))


def _sliding_with_sinks() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": kinds}
    return GptOssForCausalLM(GptOssConfig(**_SHAPE, **_TWO_KV_HEADS, **more))


def _experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, **_TWO_KV_HEADS, **_EXPERTS))


def _latent() -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    # Of 512 + 64 as in DeepSeek's own: vLLM's kernel for a CPU has no other size. And with their scaled RoPE: the other
    # is `ops.rotary_embedding`, which vLLM 0.32 has turn the wrong rows of [tokens, heads, size] on a CPU.
    latent = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "q_lora_rank": None,
    }
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    scaled = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    scaled |= {"beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7}
    config = DeepseekV2Config(**_SHAPE, **latent, **experts, **groups, num_key_value_heads=2, rope_parameters=scaled)
    return DeepseekV2ForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "sliding": _sliding,
    "sliding and full": _sliding_and_full,
    "sliding with sinks": _sliding_with_sinks,
    "experts": _experts,
    "latent": _latent,
}


def make(family: str, folder: Path) -> Path:
    """Write a model of this family into `folder`, with the pair's tokenizer, and return it."""
    import torch

    torch.manual_seed(0)
    FAMILIES[family]().float().eval().save_pretrained(folder)
    for path in TARGET.glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


def quantise(folder: Path, into: Path, kind: str = "int8") -> Path:
    """Write the Llama of `folder` with quantised weights, and return it.

    `kind`: "int8" and "fp8" have weights and activations of 8 bits (compressed-tensors, W8A8), "awq" weights of 4 bits.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, into)
    write, settings = _KINDS[kind]
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("proj.weight"):
            weights[name] = weight
        else:
            stem = name.removesuffix("weight")
            weights |= {stem + part: tensor for part, tensor in write(weight).items()}
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] = settings
    (into / "config.json").write_text(json.dumps(config))
    return into


def _integers(weight: Any) -> dict[str, Any]:
    import torch

    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _floats(weight: Any) -> dict[str, Any]:
    import torch

    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _four_bits(weight: Any) -> dict[str, Any]:
    """[out, in] as AWQ has it: eight columns a word, in its own order; a scale and a zero point for each group."""
    import torch

    groups = weight.T.unflatten(0, (-1, _GROUP))  # [in / 32, 32, out]
    scale = groups.abs().amax(dim=1) / 7
    whole = (groups / scale.unsqueeze(1)).round().to(torch.int64).flatten(0, 1) + 8
    return {"qweight": _packed(whole), "qzeros": _packed(torch.full(scale.shape, 8)), "scales": scale.half()}


def _packed(numbers: Any) -> Any:
    """[rows, columns] of 0 .. 15 as [rows, columns / 8] int32."""
    import torch

    shifts = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # column i of eight lies at nibble 0, 4, 1, 5, ..
    words = (numbers.unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _eight_bits(kind: str, form: str) -> dict[str, Any]:
    bits = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": bits | {"strategy": "channel", "dynamic": False},
        "input_activations": bits | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_GROUP = 32
"""Weights that have a scale in common, in AWQ."""
_KINDS: dict[str, tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]] = {
    "int8": (_integers, _eight_bits("int", "int-quantized")),
    "fp8": (_floats, _eight_bits("float", "float-quantized")),
    "awq": (
        _four_bits,
        {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"},
    ),
}
