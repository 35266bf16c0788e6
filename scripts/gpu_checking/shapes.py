"""Pairs of models in the shapes of well-known sizes; the numbers alone, there is nothing to download."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.repository import ROOT

RECORD = "widened_from.json"
"""Beside the config.json of a widened model: where its function comes from, and what it is widened to."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama: of the residual stream, of a layer, of the vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Numbers in the weights, norms left out; input and output embeddings are one."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The shape that a config.json describes."""
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and its draft.

    memory: share of the GPU's that vLLM may use (`gpu_memory_utilization`). draft_gpu_memory [GiB]: of KV for the draft
    of `placement: stream`; None: as it chooses.
    """

    target: Shape
    draft: Shape
    memory: float = 0.85
    draft_gpu_memory: float | None = None


PAIRS = {
    "8b/1b": Pair(Shape(32, 4096, 14336, 32, 8, 128, 128256), Shape(16, 2048, 8192, 32, 8, 64, 128256)),
    # 60 GiB of weights on a GPU of 80: what is left must do for both KV caches, at 64 requests of 256 tokens
    "32b/0.6b": Pair(Shape(64, 5120, 25600, 64, 8, 128, 151936), Shape(28, 1024, 3072, 16, 8, 128, 151936), 0.92, 3.0),
    "small": Pair(Shape(6, 384, 1024, 6, 6, 64, 4224), Shape(3, 192, 512, 4, 4, 64, 4224)),
    "deeper": Pair(Shape(9, 384, 1024, 6, 6, 64, 4224), Shape(3, 192, 512, 4, 4, 64, 4224)),
}
"""By name, target first. "small" and "deeper" are for a CPU."""


def write_folder(source: Path, shape: Shape, folder: Path) -> Path:
    """A model folder without weights: config, tokenizer, and the record that the loader makes the weights from.

    Raises ValueError where the shape cannot hold the source's function.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    check_fits(Shape.of(config), shape)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix == ".json" and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config |= {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        # The mean of squares is over more channels, and those that are new are zero
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / shape.hidden,
    }
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    record = {"source": str(source.resolve()), "shape": dataclasses.asdict(shape)}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return folder


def default_source(part: str) -> Path:
    """The committed pair's "target" or "draft"."""
    target = ROOT / "assets" / "pair" / "target"
    return target if part == "target" else target / "draft"


def check_fits(small: Shape, wide: Shape) -> None:
    """ValueError, in one line, unless a model of the shape `wide` can compute what one of the shape `small` does."""
    for name in ("layers", "intermediate", "kv_heads", "vocabulary"):
        if getattr(wide, name) < getattr(small, name):
            raise ValueError(f"{name} {getattr(wide, name)} is less than the source's {getattr(small, name)}")
    if wide.hidden <= small.hidden:
        raise ValueError(f"hidden {wide.hidden} must be more than the source's {small.hidden}: one channel is taken")
    if small.heads != small.kv_heads:
        raise ValueError("only sources with a KV head for each head can be widened")
    if wide.head_dim % small.head_dim:
        raise ValueError(f"head_dim {wide.head_dim} is no multiple of the source's {small.head_dim}")
    if wide.heads % wide.kv_heads:
        raise ValueError(f"{wide.heads} heads cannot share {wide.kv_heads} KV heads evenly")
