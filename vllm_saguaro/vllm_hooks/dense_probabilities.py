"""The q of a step's drafts as vLLM's rejection sampler takes it: dense (0.32, `v1/sample/rejection_sampler.py`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_saguaro.messages import Proposals


class DenseProbabilities:
    """Draft probabilities [T, V] float32 as vLLM takes them, in memory that is kept from step to step.

    Only the entries that the last step wrote are zeroed, so that a step costs what it writes, not T x V.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(0, 0, device=device)
        self._written = torch.zeros(0, dtype=torch.int64, device=device)

    def fill(
        self, drafts: npt.NDArray[np.int64], vocab_size: int, positions: npt.NDArray[np.int64], q: Proposals
    ) -> torch.Tensor:
        """The q of every draft: that of `q` at `positions` [P], one-hot elsewhere. Valid until the next call.

        `drafts` [T] are the drafted tokens, `q` has P rows. A draft that its own q does not contain was not drawn from
        it, and counts as certain, which is exact for any draft. Ids outside the vocabulary are left out.
        """
        tokens, probabilities = q.tokens, q.probabilities
        within = (probabilities > 0) & (tokens >= 0) & (tokens < vocab_size)
        drawn = (within & (tokens == drafts[positions, None])).any(axis=1)
        within &= drawn[:, None]
        certain = (drafts >= 0) & (drafts < vocab_size)
        certain[positions[drawn]] = False
        certain_at = np.flatnonzero(certain)
        rows = np.broadcast_to(positions[:, None], tokens.shape)[within]
        flat = np.concatenate((rows * vocab_size + tokens[within], certain_at * vocab_size + drafts[certain_at]))
        values = np.concatenate((probabilities[within], np.ones(len(certain_at), np.float32)))

        memory = self._clean(len(drafts), vocab_size)
        self._written = torch.from_numpy(flat).to(memory.device)
        memory.view(-1).index_copy_(0, self._written, torch.from_numpy(values).to(memory.device))
        return memory[: len(drafts)]

    def _clean(self, rows: int, vocab_size: int) -> torch.Tensor:
        """Zeros everywhere, for at least so many rows."""
        if self._memory.shape[0] < rows or self._memory.shape[1] != vocab_size:
            capacity = 1 << (rows - 1).bit_length()
            self._memory = torch.zeros(capacity, vocab_size, device=self._memory.device)
        else:
            self._memory.view(-1).index_fill_(0, self._written, 0.0)
        return self._memory
