"""A `DraftModel` without weights whose paged KV really matters, and the oracle that says what it should answer.

Each slot of a block holds the token fed there. The hidden state of a position is a hash of the whole context as it is
READ from the KV through the row's block table, so a wrong block, a stale block, a copy that was left out or a wrong
position changes every logit. The oracle computes the same from a plain list of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_saguaro.algorithm.noise import gumbel_of_all
from vllm_saguaro.drafting.model import Batch

NOTHING = -7
"""What a slot holds that nobody has written: no token."""


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 to uint64, any change of the input changes about half of the bits."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class FakeModel:
    """Deterministic pseudo-random logits after each context. Checks every batch that it is given."""

    hidden_size = 4
    device = torch.device("cpu")

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = 64,
        max_length: int = 64,
        max_tokens: int = 512,
        max_rows: int = 256,
        vocab_size: int = 40,
        seed: int = 1,
    ) -> None:
        self.block_size, self.num_blocks, self.max_length = block_size, num_blocks, max_length
        self.max_tokens, self.max_rows, self.vocab_size = max_tokens, max_rows, vocab_size
        self.kv = np.full((num_blocks, block_size), NOTHING, dtype=np.int64)
        self.batches: list[tuple[int, int]] = []
        """(rows, tokens) of each forward so far."""
        self._weights = mix(np.arange(1, max_length + 1, dtype=np.uint64) + np.uint64(seed << 32))

    # ---- DraftModel --------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> torch.Tensor:
        self._check(batch)
        rows = len(batch.lengths)
        self.batches.append((rows, len(batch.token_ids)))
        spans = [slice(int(batch.query_start[r]), int(batch.query_start[r + 1])) for r in range(rows)]
        for row, span in enumerate(spans):
            at = batch.positions[span]
            self.kv[batch.blocks[row, at // self.block_size], at % self.block_size] = batch.token_ids[span]
        hashes = []
        for row, span in enumerate(spans):
            at = np.arange(int(batch.lengths[row]))
            context = self.kv[batch.blocks[row, at // self.block_size], at % self.block_size]
            hashes.append(self._prefix_hashes(context)[batch.positions[span]])
        return _to_hidden(np.concatenate(hashes))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._logits(_from_hidden(hidden)))

    def greedy(self, hidden: torch.Tensor) -> np.ndarray:
        return self._logits(_from_hidden(hidden)).argmax(-1)

    def race(self, logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return (logits.double() + gumbel_of_all(seeds, logits.shape[-1])).argmax(-1)

    def copy_blocks(self, source: Sequence[int], destination: Sequence[int]) -> None:
        assert len(source) == len(destination)
        assert len(set(destination)) == len(destination), "a block is copied to twice"
        assert not set(source) & set(destination), "sources and destinations overlap"
        assert all(0 <= block < self.num_blocks for block in (*source, *destination))
        self.kv[list(destination)] = self.kv[list(source)]

    # ---- the oracle --------------------------------------------------------------------------------------------

    def logits_after(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [V] after this text, from the list alone."""
        last = self._prefix_hashes(np.asarray(tokens, dtype=np.int64))[-1:]
        return torch.from_numpy(self._logits(last))[0]

    def state_after(self, tokens: np.ndarray) -> torch.Tensor:
        """The hidden state [1, hidden_size] after this text."""
        return _to_hidden(self._prefix_hashes(tokens.astype(np.int64))[-1:])

    def greedy_continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens of this text, from the list alone."""
        text = list(tokens)
        for _ in range(count):
            text.append(int(self.logits_after(text).argmax()))
        return text[len(tokens) :]

    def wipe(self, blocks: Iterable[int]) -> None:
        """Forget what is in these blocks, as another tenant would."""
        self.kv[list(blocks)] = NOTHING

    # ---- inside ------------------------------------------------------------------------------------------------

    def _prefix_hashes(self, tokens: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            terms = mix((tokens + 100).astype(np.uint64)) * self._weights[: len(tokens)]
            return mix(np.cumsum(terms, dtype=np.uint64))

    def _logits(self, hashes: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            salted = hashes[:, None] + np.arange(1, self.vocab_size + 1, dtype=np.uint64) * np.uint64(
                0x9E3779B97F4A7C15
            )
        uniform = (mix(salted) >> np.uint64(11)).astype(np.float64) / 2.0**53
        gumbel = -np.log(-np.log(uniform.clip(1e-12, 1 - 1e-12)))
        return (2.0 * gumbel).astype(np.float32)

    def _check(self, batch: Batch) -> None:
        rows, tokens = len(batch.lengths), len(batch.token_ids)
        assert batch.token_ids.dtype == np.int64
        assert batch.positions.dtype == np.int64
        assert (batch.query_start.dtype, batch.lengths.dtype, batch.blocks.dtype) == (np.int32,) * 3
        assert 0 < rows <= self.max_rows, f"{rows} rows, at most {self.max_rows}"
        assert 0 < tokens <= self.max_tokens, f"{tokens} tokens, at most {self.max_tokens}"
        assert batch.positions.shape == (tokens,)
        assert batch.query_start.shape == (rows + 1,)
        assert batch.blocks.shape[0] == rows
        assert batch.query_start[0] == 0
        assert batch.query_start[-1] == tokens
        assert ((batch.blocks >= 0) & (batch.blocks < self.num_blocks)).all(), "a block id is out of range"
        assert ((batch.token_ids >= 0) & (batch.token_ids < self.vocab_size)).all(), "no token of this vocabulary"
        assert (batch.positions < self.max_length).all(), "beyond the maximum length"
        used: list[set[int]] = []
        written: list[set[int]] = []
        for row in range(rows):
            at = batch.positions[batch.query_start[row] : batch.query_start[row + 1]]
            assert len(at) > 0, "a row without tokens"
            assert (np.diff(at) == 1).all(), "the positions of a row are not consecutive"
            assert batch.lengths[row] == at[-1] + 1
            width = -(-int(batch.lengths[row]) // self.block_size)
            assert width <= batch.blocks.shape[1], "the block table is too short for the row"
            table = batch.blocks[row]
            used.append({int(block) for block in table[:width]})
            written.append({int(table[p]) for p in at // self.block_size})
            assert len(used[-1]) == width, "a block occurs twice in one row"
        for row, blocks in enumerate(written):
            others = set().union(*(used[:row] + used[row + 1 :]))
            assert not blocks & others, "a row writes into a block of another row"


def _to_hidden(hashes: np.ndarray) -> torch.Tensor:
    parts = [(hashes >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
    return torch.from_numpy(np.stack(parts, axis=-1).astype(np.float32))


def _from_hidden(hidden: torch.Tensor) -> np.ndarray:
    parts = hidden.numpy().astype(np.uint64)
    return sum((parts[:, i] << np.uint64(16 * i) for i in range(1, 4)), start=parts[:, 0])
