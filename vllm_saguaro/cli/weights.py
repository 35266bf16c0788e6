"""How much a model weighs, from the headers of its safetensors files alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LENGTH_BYTES: Final = 8
_LONGEST_HEADER: Final = 100_000_000
"""The format's own limit."""
_FLOATING: Final = ("F64", "F32", "F16", "BF16")


class WeightsError(ValueError):
    """The files are not what they should be; one line."""


@dataclass(frozen=True, slots=True)
class Weights:
    """`floats`: numbers in floating point, which are loaded in the engine's type. `other_bytes`: all else, as it is."""

    files: int
    floats: int
    float_bytes: int
    other_bytes: int

    def bytes_loaded(self, item_bytes: int) -> int:
        """Of all tensors once floats take `item_bytes` each. Quantised ones (other types) keep their size."""
        return self.floats * item_bytes + self.other_bytes


def read_weights(folder: Path) -> Weights | None:
    """All safetensors files of a folder; None where there are none. Raises WeightsError for damaged or missing ones."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise WeightsError(f"{index} is no index of weights: download the model again") from None
        if missing := sorted(listed - names):
            raise WeightsError(f"{folder} lacks {missing[0]} ({len(missing)} files in all): download the model again")
        names = listed
    if not names:
        return None
    parts = [_read_file(folder / name) for name in sorted(names)]
    return Weights(
        len(parts),
        sum(part.floats for part in parts),
        sum(part.float_bytes for part in parts),
        sum(part.other_bytes for part in parts),
    )


def _read_file(path: Path) -> Weights:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_LONGEST_HEADER, size - _LENGTH_BYTES):
            raise WeightsError(f"{path} is no safetensors file (a Git LFS pointer?): download the model again")
        try:
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            ends = [int(tensor["data_offsets"][1]) for tensor in tensors]
            spans = [int(tensor["data_offsets"][1]) - int(tensor["data_offsets"][0]) for tensor in tensors]
            kinds = [str(tensor["dtype"]) for tensor in tensors]
            counts = [math.prod(int(side) for side in tensor["shape"]) for tensor in tensors]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise WeightsError(f"{path} has a damaged header: download the model again") from None
    if size < _LENGTH_BYTES + length + max(ends, default=0):
        raise WeightsError(f"{path} is cut short: download the model again")
    floating = [kind in _FLOATING for kind in kinds]
    floats = sum(count for count, is_float in zip(counts, floating, strict=True) if is_float)
    float_bytes = sum(span for span, is_float in zip(spans, floating, strict=True) if is_float)
    return Weights(1, floats, float_bytes, sum(spans) - float_bytes)
