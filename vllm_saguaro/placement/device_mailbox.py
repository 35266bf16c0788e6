"""The process placement under vLLM's Model Runner V2: a draft side beside, whose mailbox the target's device reads itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_saguaro.counters import CounterPage
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.placement.layout import MailboxShape

OutcomeLookup = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`algorithm` or `kernels`: accepted_keys, bonus_keys, drafts, depth, slots, accepted, bonus -> branch, tokens, ready."""


class MailboxDraft:
    """`DeviceDraft` over the mailbox of a draft process. All calls come from the runner's thread."""

    resident_bytes: int

    def __init__(
        self,
        channel: Channel,
        shape: MailboxShape,
        device: torch.device,
        lookup: OutcomeLookup,
        page: CounterPage,
        log: logging.Logger,
    ) -> None:
        """`channel`: the draft side, of mailboxes of this `shape`, which has `device_steps` and a slot for each of the
        runner's. `lookup`: `outcome_lookup` for the device. `page`: where hits and misses are counted.
        """
        raise NotImplementedError

    def wait_until_ready(self) -> None:
        """Return once the draft has loaded. Raises `DraftFailed` when it cannot, or is closed meanwhile."""
        raise NotImplementedError

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """A request, new or resumed, has this slot from now on, and this text."""
        raise NotImplementedError

    def release(self, slot: int, request_id: str) -> None:
        """The request has left its slot."""
        raise NotImplementedError

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Look the outcomes up, and tell them to the draft side."""
        raise NotImplementedError

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        """The q of the drafts that the last `exchange` gave for these outcomes."""
        raise NotImplementedError

    def capture(self) -> None:
        """Nothing is captured: a step is some small kernels and copies, whose addresses change with a restart."""

    def close(self) -> None:
        """End the draft side and let go of its memory."""
        raise NotImplementedError
