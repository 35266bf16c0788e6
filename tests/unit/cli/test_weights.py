"""Headers of safetensors files that are written here, bytes and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_saguaro.cli.weights import WeightsError, read_weights


def write(path: Path, tensors: dict[str, tuple[str, list[int], int]], data: int | None = None) -> None:
    """Tensors by name: dtype, shape, bytes. `data`: bytes that really follow, all of them unless it is given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, span) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + span]}
        at += span
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at if data is None else data))


def test_floats_take_the_engines_type_and_others_keep_their_size(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": ("BF16", [4, 8], 64), "b": ("I32", [3], 12), "s": ("F32", [], 4)})
    weights = read_weights(tmp_path)
    assert weights is not None
    assert (weights.files, weights.floats, weights.float_bytes, weights.other_bytes) == (1, 33, 68, 12)
    assert weights.bytes_loaded(4) == 33 * 4 + 12


def test_a_folder_without_weights_is_none_and_shards_add_up(tmp_path: Path) -> None:
    assert read_weights(tmp_path) is None
    write(tmp_path / "model-1.safetensors", {"a": ("F32", [2], 8)})
    write(tmp_path / "model-2.safetensors", {"b": ("F32", [3], 12)})
    write(tmp_path / "leftover.safetensors", {"c": ("F32", [100], 400)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = read_weights(tmp_path)
    assert weights is not None
    assert (weights.files, weights.floats) == (2, 5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        (b"", "LFS"),
        ((7).to_bytes(8, "little") + b"no json", "damaged"),
        ((11).to_bytes(8, "little") + b'{"a": "b"}\n', "damaged"),
    ],
)
def test_what_is_no_such_file_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=says) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": ("F32", [2], 8)}, data=7)
    with pytest.raises(WeightsError, match="cut short"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(WeightsError, match="lacks other"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="no index"):
        read_weights(tmp_path)
