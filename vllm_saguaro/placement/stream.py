"""`placement: stream`: the draft on the target's own device, on a stream of its own, without a thread."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.side_stream import SideStream


class StreamDraft:
    """`DeviceDraft` over a `DeviceEngine`: made by `vllm_hooks.stream_draft.make_stream_draft`."""

    resident_bytes: int

    def __init__(self, engine: DeviceEngine, stream: SideStream) -> None:
        raise NotImplementedError

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """A request, new or resumed, holds this slot from now on, with these tokens; replaces what the slot held."""

    def release(self, slot: int, request_id: str) -> None:
        """The request has left the slot."""

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Look the outcomes up, gather the drafts, and enqueue the round of the next table."""
        raise NotImplementedError

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        """Write q of the drafts just given."""

    def capture(self) -> None:
        """Capture CUDA graphs, after the target's; nothing on the CPU."""

    def close(self) -> None:
        """Let go of everything."""
