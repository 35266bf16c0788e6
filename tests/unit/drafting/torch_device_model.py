"""`FakeDeviceModel` in operations of PyTorch: on any device, and fit for a CUDA graph. It looks into nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.drafting.device_model import DecodeRows, Piece


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, of 64 bits that are called signed here."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class TorchDeviceModel(FakeDeviceModel):
    """The same language, so the oracle is that of `FakeDeviceModel`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.captures = device, device.type == "cuda"
        self.kv = self.kv.to(device)
        self._weights = torch.from_numpy(self.language._weights.view("int64")).to(device)
        self._salts = torch.arange(1, self.vocab_size + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
        self._at = torch.arange(self.max_length, device=device)
        self._parts = 16 * torch.arange(4, device=device)

    def decode(self, rows: DecodeRows) -> Tensor:
        self.forwards.append(("decode", rows.input_ids.shape[0]))
        self._write(rows.slot_mapping, rows.input_ids)
        blocks = rows.tables[:, (self._at // self.block_size).clamp_max(rows.tables.shape[1] - 1)].long()
        context = self.kv[blocks, self._at % self.block_size]
        terms = torch.where(self._at < rows.lengths.unsqueeze(1), mix(context + 100) * self._weights, 0)
        return ((mix(terms.sum(1)).unsqueeze(1) >> self._parts) & 0xFFFF).float()

    def read(self, piece: Piece) -> None:
        self.forwards.append(("read", piece.token_ids.shape[0]))
        self._write(piece.slot_mapping, piece.token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        hashes = (hidden.long() << self._parts).sum(1)
        uniform = _shifted(mix(hashes.unsqueeze(1) + self._salts), 11).double() / 2.0**53
        return (-2.0 * (-uniform.clamp(1e-12, 1 - 1e-12).log()).log()).float()

    def prepare(self, rows: DecodeRows) -> None:
        """Nothing is kept beside the rows."""

    def text_at(self, table: Sequence[int], length: int) -> list[int]:
        at = torch.arange(length)
        return self.kv.cpu()[torch.tensor(table)[at // self.block_size], at % self.block_size].tolist()

    def _write(self, places: Tensor, ids: Tensor) -> None:
        """What has no place goes to the first one, which is nobody's."""
        self.kv.view(-1).index_put_((places.clamp_min(0),), ids)
