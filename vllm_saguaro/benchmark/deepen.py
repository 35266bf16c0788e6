"""Make a Llama folder deeper without changing what it computes.

A layer adds the outputs of its attention and of its MLP to the residual stream. With the last matrix of both (o_proj
and down_proj) zero it adds exactly zero, at the full cost of a layer. The result answers as the source does and is as
slow as a larger model: a slow target for a draft that still fits it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_WRITES_TO_RESIDUAL = ("self_attn.o_proj.", "mlp.down_proj.")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def deepen(source_folder: str | Path, destination_folder: str | Path, layers: int, seed: int = 0) -> Path:
    """Copy the Llama in ``source_folder`` with layers appended up to ``layers`` in all; return the destination.

    The new layers change no logit: their o_proj and down_proj are zero. Their other matrices are small random numbers
    drawn with ``seed``, their norms are one; types and shapes are those of the source's last layer. Everything else in
    the folder (tokenizer, generation settings) is copied; sub-folders such as ``draft/`` are not.
    """
    source, destination = Path(source_folder), Path(destination_folder)
    if source.resolve() == destination.resolve():
        raise ValueError("the destination must be another folder than the source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"only Llama folders can be deepened, not model_type {config.get('model_type')!r}")
    present: int = config["num_hidden_layers"]
    if layers < present:
        raise ValueError(f"the source has {present} layers already, {layers} would be fewer")

    weights: dict[str, torch.Tensor] = {}
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no *.safetensors in {source}")
    for shard in shards:
        weights.update(load_file(shard))
    weights.update(_silent_layers(weights, range(present, layers), seed))

    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] += [config["layer_types"][-1]] * (layers - present)

    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(source, destination)
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def _silent_layers(weights: dict[str, torch.Tensor], indices: range, seed: int) -> dict[str, torch.Tensor]:
    """Return the tensors of new layers ``indices``, shaped as those of layer ``indices.start - 1`` in ``weights``."""
    template = {
        match[2]: tensor
        for name, tensor in sorted(weights.items())
        if (match := _LAYER.match(name)) and int(match[1]) == indices.start - 1
    }
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for index in indices:
        for suffix, like in template.items():
            if suffix.startswith(_WRITES_TO_RESIDUAL):
                tensor = torch.zeros_like(like)
            elif like.dim() == 1 and suffix.endswith("norm.weight"):
                tensor = torch.ones_like(like)
            else:
                tensor = (0.02 * torch.randn(like.shape, generator=generator)).to(like.dtype)
            made[f"model.layers.{index}.{suffix}"] = tensor
    return made


def _copy_small_files(source: Path, destination: Path) -> None:
    """Copy the files directly in ``source`` that hold no weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, destination / path.name)
