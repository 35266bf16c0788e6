"""What the draft engine asks of a model. `vllm_hooks/draft_model.py` answers with vLLM's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(slots=True)
class Batch:
    """One forward of R rows and T tokens in all, row by row. Host arrays: the model moves them to its device.

    token_ids   [T] int64
    positions   [T] int64    position of each token in its row's text; also its place in the row's KV
    query_start [R + 1] int32    row r feeds tokens query_start[r] .. query_start[r + 1]
    lengths     [R] int32    tokens of the row with KV after this forward (last position + 1)
    blocks      [R, W] int32    block ids of each row, padded with 0
    """

    token_ids: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    lengths: np.ndarray
    blocks: np.ndarray


class DraftModel(Protocol):
    """A causal language model with a paged KV cache whose blocks the caller hands out."""

    device: torch.device
    vocab_size: int
    """Width of the logits; token ids at or above it never occur."""
    hidden_size: int
    block_size: int
    """Tokens a block."""
    num_blocks: int
    """Block ids are 0 .. num_blocks - 1."""
    max_length: int
    """Longest text, in tokens, that the model can hold."""
    max_tokens: int
    """Most tokens in one forward."""
    max_rows: int
    """Most rows in one forward."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Write the KV of every token of `batch`; return hidden states [T, hidden_size] on the model's device."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab_size] float32 of hidden states [R, hidden_size]."""
        ...

    def greedy(self, hidden: torch.Tensor) -> np.ndarray:
        """The likeliest token [R] int64 (on the host) after each of the hidden states [R, hidden_size]."""
        ...

    def race(self, logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """argmax_t logits_t + g_t [R] int64 of logits [R, V] float32, with the noise of `noise.gumbel` for seeds [R].

        int64 seeds; on the model's device.
        """
        ...

    def copy_blocks(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of whole blocks in every layer, source[i] to destination[i]; the two are disjoint."""
        ...
