"""`placement: stream` put together: vLLM's draft model, the device engine, and a stream for them."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_saguaro.placement.stream import StreamDraft
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What the stream placement is made from.

    model: how the draft is loaded. `device` is the worker's, such as "cuda:0"; `kv_cache_bytes` is the draft's KV, 0
    for `default_kv_bytes`; `max_rows` is set here. slots: the runner's max_num_seqs. branches: N, or None for
    `buckets.default_branches`. method: "probabilistic", or "greedy" for drafts without q ("coupled" is the first: under
    runner V2 no noise is known beforehand). sampling_c: C of Saguaro sampling, 1 for none.
    """

    model: DraftModelConfig
    slots: int
    num_speculative_tokens: int
    branches: int | None = None
    method: str = "probabilistic"
    sampling_c: float = 1.0
    seed: int | None = None


def make_stream_draft(options: StreamOptions) -> StreamDraft:
    """Load the draft and allocate all that it holds: weights, KV, tables, buffers.

    To be called in the worker before vLLM measures memory (`determine_available_memory`), at best at the end of
    `load_model`. ValueError, in one line, where the draft cannot be used so.
    """
    raise NotImplementedError
