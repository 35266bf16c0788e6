"""Weights for a model of any size that computes what a small trained one does: made where they are needed.

A benchmark needs the cost of a large model and the answers of a trained one, and there may be no network to fetch
either. The small model lies in the first channels, heads and layers of the large one; the matrices that would write
anything else into the residual stream are zero there, all others are random. One more channel holds a small constant,
by which the output layer keeps the tokens that the small model does not have from ever being likely.

The function is the source's up to rounding, not to the last bit: engines that are compared must all run the wide model.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.gpu_checking.shapes import RECORD, Shape

LOAD_FORMAT = "widened"
_CONSTANT = 2.0**-5
"""What the extra channel holds: small beside the others, so that it changes no norm."""
_NEVER = -1e5
"""The weight of that channel in the output rows of tokens that must not come."""
_SPREAD = 0.02


def wide_weights(
    source: Path, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the wide model, by their names in a checkpoint, one at a time."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    small = Shape.of(config)
    weights: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        weights.update(load_file(shard))
    maker = _Maker(small, shape, device, dtype, seed)
    embedding = weights["model.embed_tokens.weight"]
    yield "model.embed_tokens.weight", maker.vocabulary(embedding)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        for name, tensor in maker.layer(part):
            yield prefix + name, tensor
    yield "model.norm.weight", maker.norm(weights["model.norm.weight"], constant=1.0)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", maker.vocabulary(weights["lm_head.weight"])


class _Maker:
    """Makes the tensors of one model; silent ones where a layer has no source."""

    def __init__(self, small: Shape, wide: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._small, self._wide, self._device, self._dtype = small, wide, device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def vocabulary(self, source: Tensor) -> Tensor:
        """[V, H]: the source's rows, and rows of tokens that never come."""
        tensor = self._zeros(self._wide.vocabulary, self._wide.hidden)
        rows, columns = source.shape
        tensor[:rows, :columns] = source.to(self._device)
        tensor[:rows, columns] = _CONSTANT
        tensor[rows:, columns] = _NEVER
        return tensor

    def norm(self, source: Tensor | None, constant: float = 0.0) -> Tensor:
        """[H]: the source's, scaled to a mean over more channels; 1 beyond, but for the constant channel."""
        tensor = torch.ones(self._wide.hidden, device=self._device, dtype=self._dtype)
        if source is not None:
            scale = math.sqrt(self._small.hidden / self._wide.hidden)
            tensor[: self._small.hidden] = scale * source.to(self._device, torch.float32)
        tensor[self._small.hidden] = constant
        return tensor

    def layer(self, part: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a layer; `part` is the source's, or empty."""
        small, wide = self._small, self._wide
        shared = wide.heads // wide.kv_heads
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield name, self.norm(part.get(name))
        # Frequency i of the source is frequency r i of a head that is r times as wide
        spread = torch.arange(small.head_dim // 2) * (wide.head_dim // small.head_dim)
        turned = torch.cat((spread, spread + wide.head_dim // 2))
        plain = torch.arange(small.head_dim)
        sharper = math.sqrt(wide.head_dim / small.head_dim)
        for name, heads, step, channels, scale in (
            ("self_attn.q_proj.weight", wide.heads, shared, turned, sharper),
            ("self_attn.k_proj.weight", wide.kv_heads, 1, turned, 1.0),
            ("self_attn.v_proj.weight", wide.kv_heads, 1, plain, 1.0),
        ):
            tensor = self._random(heads * wide.head_dim, wide.hidden)
            if part:
                used = self._channels(step, channels)
                if "q_proj" in name:  # a product with anything is zero there
                    tensor.view(heads, wide.head_dim, -1)[: small.heads * step : step] = 0
                tensor[used, : small.hidden] = (scale * part[name].to(self._device, torch.float32)).to(self._dtype)
            yield name, tensor
        output = self._zeros(wide.hidden, wide.heads * wide.head_dim)
        if part:
            output[: small.hidden, self._channels(shared, plain)] = part["self_attn.o_proj.weight"].to(output)
        yield "self_attn.o_proj.weight", output
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            tensor = self._random(wide.intermediate, wide.hidden)
            if part:
                tensor[: small.intermediate, : small.hidden] = part[name].to(tensor)
            yield name, tensor
        output = self._zeros(wide.hidden, wide.intermediate)
        if part:
            output[: small.hidden, : small.intermediate] = part["mlp.down_proj.weight"].to(output)
        yield "mlp.down_proj.weight", output

    def _channels(self, step: int, of_head: Tensor) -> Tensor:
        """Where the channels of the source's heads lie, if its heads are every `step`-th and a head's lie `of_head`."""
        first = torch.arange(self._small.heads) * step * self._wide.head_dim
        return (first.unsqueeze(1) + of_head).flatten().to(self._device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def _random(self, *shape: int) -> Tensor:
        tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
        return tensor.normal_(0, _SPREAD, generator=self._generator)


def write_plugin(folder: Path) -> Path:
    """A folder that, on PYTHONPATH, makes vLLM call `register_loader` in each of its processes.

    That of a draft is started by the plugin, not by us, and has to know the load format, too.
    """
    installed = folder / "gpu_checking-0.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gpu-checking\nVersion: 0\n", encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{LOAD_FORMAT} = {register_loader.__module__}:{register_loader.__name__}\n"
    (installed / "entry_points.txt").write_text(entry, encoding="utf-8")
    return folder


@functools.cache
def register_loader() -> None:
    """Teach vLLM, in this process and once, the load format "widened": for folders of `shapes.write_folder`."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class WidenedLoader(BaseModelLoader):
        """Makes weights on the model's own device."""

        def download_model(self, model_config: Any) -> None:
            """Nothing is fetched."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Give the model its weights, which it puts together as it does those of any checkpoint."""
            record = json.loads((Path(model_config.model) / RECORD).read_text(encoding="utf-8"))
            device = next(model.parameters()).device
            source, shape = Path(record["source"]), Shape(**record["shape"])
            model.load_weights(wide_weights(source, shape, device, model_config.dtype))

    register_model_loader(LOAD_FORMAT)(WidenedLoader)
