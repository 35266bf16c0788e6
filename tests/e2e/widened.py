"""The pair's target with more attention heads, which say nothing: eight can be divided among ranks, five cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.e2e.harness import TARGET


def widen(folder: Path, heads: int = 8) -> Path:
    """Write the target into `folder` with so many heads, and return it.

    The new heads' keys, queries and values are small random numbers; o_proj takes nothing from them, so the model
    computes what it did. (Only sums of more zeros may be rounded otherwise.)
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((TARGET / "config.json").read_text())
    assert config["num_attention_heads"] == config["num_key_value_heads"] < heads
    more = (heads - config["num_attention_heads"]) * config["head_dim"]
    config["num_attention_heads"] = config["num_key_value_heads"] = heads
    random = torch.Generator().manual_seed(0)
    weights = load_file(TARGET / "model.safetensors")
    for name, matrix in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            rows = 0.02 * torch.randn(more, matrix.shape[1], generator=random)
            weights[name] = torch.cat((matrix, rows.to(matrix.dtype)))
        elif name.endswith("o_proj.weight"):
            weights[name] = torch.cat((matrix, matrix.new_zeros(matrix.shape[0], more)), dim=1)
    folder.mkdir()
    for path in TARGET.iterdir():
        if path.is_file() and path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
