"""Tiny model folders, without weights, enough for vLLM to build its configuration objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_model(folder: Path, vocab_size: int = 320, tokens: int = 300, word: str = "w", **changes: Any) -> Path:
    """Write a Llama-shaped `config.json` and a tokenizer of `tokens` words that begin with `word`."""
    folder.mkdir(parents=True, exist_ok=True)
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
