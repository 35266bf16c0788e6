"""A `DeviceModel` without weights whose paged KV really matters: the static twin of `fake_model.FakeModel`.

Each place of a block holds the token fed there, and a hidden state is a hash of the whole context as it is READ through
the row's table. It looks into every forward that it is given, as no GPU would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.unit.drafting.fake_model import NOTHING, FakeModel
from vllm_saguaro.drafting.device_model import NO_PLACE, NULL_BLOCK, DecodeRows, Piece


class FakeDeviceModel:
    """The language of `FakeModel`, and its oracle, for the device engine."""

    device = torch.device("cpu")
    dtype = torch.float32
    hidden_size = FakeModel.hidden_size
    resident_bytes = 0
    captures = False

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        max_length: int = 64,
        max_tokens: int = 512,
        vocab_size: int = 40,
        seed: int = 1,
    ) -> None:
        self.block_size, self.num_blocks, self.max_length = block_size, num_blocks, max_length
        self.max_tokens, self.vocab_size = max_tokens, vocab_size
        self.language = FakeModel(max_length=max_length, vocab_size=vocab_size, seed=seed)
        self.kv = torch.full((num_blocks, block_size), NOTHING, dtype=torch.int64)
        self.forwards: list[tuple[str, int]] = []
        """What each forward was, and its tokens."""
        self.closed = False

    @property
    def pages(self) -> Sequence[Tensor]:
        return [self.kv.unsqueeze(0)]

    def decode(self, rows: DecodeRows) -> Tensor:
        self.forwards.append(("decode", rows.input_ids.shape[0]))
        ids, positions, lengths = rows.input_ids.numpy(), rows.positions.numpy(), rows.lengths.numpy()
        tables, places = rows.tables.numpy(), rows.slot_mapping.numpy()
        assert ((ids >= 0) & (ids < self.vocab_size)).all(), "no token of this vocabulary"
        assert ((positions >= 0) & (positions < self.max_length)).all(), "no position of a text"
        assert (lengths == positions + 1).all()
        assert ((tables >= 0) & (tables < self.num_blocks)).all(), "a block id is out of range"
        kv = self.kv.numpy()
        written = places != NO_PLACE
        block = tables[np.arange(len(ids)), positions // self.block_size]
        assert (places == block * self.block_size + positions % self.block_size)[written].all(), "a wrong place"
        mine = places[written & (block != NULL_BLOCK)]
        assert len(set(mine.tolist())) == len(mine), "two rows write to one place"
        kv.reshape(-1)[places[written]] = ids[written]
        states = [self._state(kv, tables[row], int(positions[row])) for row in range(len(ids))]
        return torch.cat(states)

    def read(self, piece: Piece) -> None:
        count = piece.token_ids.shape[0]
        assert 0 < count <= self.max_tokens, "too many tokens at once"
        self.forwards.append(("read", count))
        ids, places, table = piece.token_ids.numpy(), piece.slot_mapping.numpy(), piece.table.numpy()
        assert ((ids >= 0) & (ids < self.vocab_size)).all(), "no token of this vocabulary"
        position = np.arange(piece.start, piece.start + count)
        assert position[-1] < self.max_length, "beyond the maximum length"
        written = places != NO_PLACE
        block = table[position // self.block_size]
        assert (places == block * self.block_size + position % self.block_size)[written].all(), "a wrong place"
        assert (block[written] != NULL_BLOCK).all(), "a text is written where nobody's is"
        self.kv.numpy().reshape(-1)[places[written]] = ids[written]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language.logits(hidden)

    def prepare(self, rows: DecodeRows) -> None:
        raise AssertionError("there are no graphs here")

    def close(self) -> None:
        self.closed = True

    # ---- for tests ---------------------------------------------------------------------------------------------

    def text_at(self, table: Sequence[int], length: int) -> list[int]:
        """The tokens whose KV a row with this table would read."""
        at = np.arange(length)
        blocks = np.asarray(table)[at // self.block_size]
        return self.kv.numpy()[blocks, at % self.block_size].tolist()

    def wipe(self, blocks: Iterable[int]) -> None:
        """Forget what is in these blocks, as another tenant would."""
        self.kv[list(blocks)] = NOTHING

    def _state(self, kv: np.ndarray, table: np.ndarray, position: int) -> Tensor:
        at = np.arange(position + 1)
        context = kv[table[at // self.block_size], at % self.block_size]
        return self.language.state_after(context)
