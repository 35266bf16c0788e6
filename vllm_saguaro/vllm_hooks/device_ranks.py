"""Tensor parallelism under runner V2 (vLLM 0.32 and 0.33): all ranks have what the first one sampled and drafted.

In vLLM all ranks sample, each for itself, from the same gathered logits, with the same seeds and the same drafts. Here
the first rank alone has a draft, and so it alone knows which drafts are filler (and q, if any). Nothing else could be
trusted to be equal anyway: whether a draft came in time is chance. So once a step, in the order of the stream, the
first rank sends what it sampled and what it drafted, in one message, and the others put that in the place of their own.
They get it where the runner books the tokens (`postprocess_sampled`): behind the last collective of the step, the
logits of a prompt's tokens, and before the next, in the forward of the step after. No host waits for it.

Message, int64 [B, C + 2 + K]: sampled tokens (C = 1 in a step without drafts, else K + 1), how many of them count, how
many drafts were rejected, drafts. B, C and K are known to all ranks, since the scheduler tells all the same.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_saguaro.vllm_hooks.runner_v2 import SaguaroSpeculator


class Ranks:
    """The ranks of a tensor-parallel target, as seen from one of them. All calls enqueue only."""

    def __init__(self, group: GroupCoordinator, num_speculative_tokens: int) -> None:
        self._group = group
        self._drafts = num_speculative_tokens
        self._sampled: tuple[Tensor, Tensor, Tensor] | None = None
        """The first rank: what it has sampled in this step, until it has drafted."""
        self._received: Tensor | None = None
        """Another rank: drafts [B, K] int64 of the message of this step, until it is asked for them."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that has the draft."""
        return bool(self._group.rank_in_group == 0)

    def book(
        self,
        original: Callable[..., None],
        idx_mapping: Tensor,
        sampled_tokens: Tensor,
        num_sampled: Tensor,
        num_rejected: Tensor,
        *others: Any,
        **named: Any,
    ) -> None:
        """In the place of the runner's `postprocess_sampled`: with what the first rank sampled, [B, C], [B] and [B]."""
        if self.leads:
            self._sampled = sampled_tokens, num_sampled, num_rejected
        else:
            rows, columns = sampled_tokens.shape
            shape = (rows, columns + 2 + self._drafts)
            message = self._group.broadcast(torch.empty(shape, dtype=torch.int64, device=sampled_tokens.device))
            sampled_tokens = message[:, :columns].to(sampled_tokens.dtype).contiguous()
            num_sampled = message[:, columns].to(num_sampled.dtype)
            num_rejected = message[:, columns + 1].to(num_rejected.dtype)
            self._received = message[:, columns + 2 :]
        original(idx_mapping, sampled_tokens, num_sampled, num_rejected, *others, **named)

    def share(self, drafts: Tensor) -> None:
        """After drafting: `drafts` [B, K] int64 become the first rank's. RuntimeError where nothing was booked."""
        if self.leads:
            sampled, self._sampled = self._sampled, None
            if sampled is None:
                raise RuntimeError("vllm_saguaro: drafts are asked for, and no tokens were booked before")
            tokens, *counts = sampled
            self._group.broadcast(torch.cat((tokens, *(count.unsqueeze(-1) for count in counts), drafts), dim=1).long())
            return
        received, self._received = self._received, None
        if received is None:
            raise RuntimeError("vllm_saguaro: drafts are asked for, and no tokens were booked before")
        drafts.copy_(received)


def install(runner: GPUModelRunner, speculator: SaguaroSpeculator, group: GroupCoordinator) -> None:
    """Have all ranks of `group` book and draft alike; nothing where there is but one.

    To be called on every rank at the same point: the first message is sent here, so that what the group needs for it is
    there before memory is measured.
    """
    if group.world_size == 1:
        return
    ranks = Ranks(group, runner.num_speculative_steps)
    original: Any = runner.postprocess_sampled
    runner.postprocess_sampled = functools.partial(ranks.book, original)
    speculator.ranks = ranks
    group.broadcast(torch.zeros(1, dtype=torch.int64, device=runner.device))
