"""Tiny model folders, without weights, enough for vLLM to build its configuration objects; and its CPU kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a Llama-shaped `config.json` and a tokenizer of `tokens` words that begin with `word`."""

    def make(name: str, vocab_size: int = 320, tokens: int = 300, word: str = "w", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "vocab_size": vocab_size,
            "dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        vocab = {f"{word}{i}": i for i in range(tokens)}
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": f"{word}0"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        return folder

    return make


@pytest.fixture(scope="session")
def worker_kernels() -> None:
    """What vLLM's CPU worker puts in the place of Triton kernels.

    It looks through all loaded modules for them and fails at those of llvmlite, which other tests may have loaded:
    these are out of its sight meanwhile.
    """
    from vllm.platforms import current_platform

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)
