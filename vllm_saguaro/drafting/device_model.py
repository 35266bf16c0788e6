"""What the device engine asks of a model. `vllm_hooks/device_draft_model.py` answers with vLLM's own parts.

All tensors are on the model's device, and no call waits for it. X rows of one token each, W blocks in the widest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NULL_BLOCK = 0
"""The block that belongs to nobody: rows without a text read and write there."""

NO_PLACE = -1
"""In a slot mapping: the KV of this token goes nowhere."""


@dataclass(slots=True)
class DecodeRows:
    """The buffers of one forward of X rows, a token each. They stay where they are, so that a CUDA graph can hold them.

    input_ids [X] int64
    positions [X] int64    of the token in its row's text
    lengths [X] int32      tokens with KV after this forward: positions + 1
    tables [X, W] int32    block ids of each row; beyond what a row needs there may be anything that is an id
    slot_mapping [X] int64    place of the token's KV: block id * block_size + offset, or NO_PLACE
    """

    input_ids: Tensor
    positions: Tensor
    lengths: Tensor
    tables: Tensor
    slot_mapping: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> DecodeRows:
        """Rows that do no harm: token 0 at position 0, in the null block."""
        return cls(
            input_ids=torch.zeros(rows, dtype=torch.int64, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            lengths=torch.ones(rows, dtype=torch.int32, device=device),
            tables=torch.full((rows, width), NULL_BLOCK, dtype=torch.int32, device=device),
            slot_mapping=torch.full((rows,), NO_PLACE, dtype=torch.int64, device=device),
        )


@dataclass(slots=True)
class Piece:
    """Some tokens of one text, T of them, to be read in one forward.

    token_ids [T] int64; `start`, the position of the first, is known on the host; table [W] int32; slot_mapping [T]
    int64. Tokens whose place is NO_PLACE are padding at the end.
    """

    token_ids: Tensor
    start: int
    table: Tensor
    slot_mapping: Tensor


class DeviceModel(Protocol):
    """A causal language model with a paged KV cache whose blocks the caller hands out, driven without the host."""

    device: torch.device
    dtype: torch.dtype
    """Of hidden states."""
    vocab_size: int
    """Width of the logits; token ids at or above it never occur."""
    hidden_size: int
    block_size: int
    """Tokens a block."""
    num_blocks: int
    """Block ids are 0 .. num_blocks - 1; NULL_BLOCK is one of them."""
    max_length: int
    """Longest text, in tokens, that the model can hold."""
    max_tokens: int
    """Most tokens in one piece."""
    resident_bytes: int
    """Weights and KV."""
    captures: bool
    """Whether its forwards may go into CUDA graphs."""

    @property
    def pages(self) -> Sequence[Tensor]:
        """The KV by blocks: tensors [layers, num_blocks, ...]. Copying block to block in all of them copies the KV."""
        ...

    def decode(self, rows: DecodeRows) -> Tensor:
        """Write the KV of every row's token; hidden states [X, hidden_size], good until the next forward."""
        ...

    def read(self, piece: Piece) -> None:
        """Write the KV of the tokens of a piece."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocab_size] float32 of hidden states [R, hidden_size]."""
        ...

    def prepare(self, rows: DecodeRows) -> None:
        """Make `decode` of these very buffers fit for a CUDA graph; called right before each warm-up and capture."""
        ...

    def close(self) -> None:
        """Give back weights and KV. The end of the model."""
        ...
