"""`min_tokens` under speculation (vLLM 0.32, `v1/sample/logits_processor/builtin.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor


class BonusMinTokens(MinTokensLogitsProcessor):
    """vLLM's own, but right at the bonus position, which has the row's drafts before it.

    vLLM counts the text without them there, so a stop token stays forbidden for up to K tokens too long.
    """

    ahead: Sequence[int] | None = None
    """Drafts before the position that `apply` is asked about, for each row; None in a step without drafts."""
    logits_slice: tuple[torch.Tensor, torch.Tensor]
    restore_logits_slice: tuple[torch.Tensor, torch.Tensor]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Forbid the stop tokens of the rows [B, V] that are still too short."""
        if self.ahead is None:
            return super().apply(logits)
        short = [row for row, (least, text, *_) in self.min_toks.items() if len(text) + self.ahead[row] < least]
        if len(short) == len(self.min_toks):
            return super().apply(logits)
        kept = self.logits_slice, self.restore_logits_slice
        try:
            self.logits_slice, self.restore_logits_slice = _of_rows(kept[0], short), _of_rows(kept[1], short)
            return super().apply(logits)
        finally:
            self.logits_slice, self.restore_logits_slice = kept


@contextlib.contextmanager
def counting_drafts(processors: LogitsProcessors, counts: Sequence[int]) -> Iterator[None]:
    """Tell the processors how many drafts are before the bonus position, while the rejection sampler works."""
    ours = [processor for processor in processors.all if isinstance(processor, BonusMinTokens)]
    for processor in ours:
        processor.ahead = counts
    try:
        yield
    finally:
        for processor in ours:
            processor.ahead = None


def _of_rows(entries: tuple[torch.Tensor, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the (row, token) pairs that belong to some rows."""
    mask = torch.isin(entries[0], torch.tensor(rows, dtype=entries[0].dtype, device=entries[0].device))
    return entries[0][mask], entries[1][mask]
