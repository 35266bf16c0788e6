"""`placement: stream` put together: vLLM's draft model, the device engine, and a stream for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from vllm.logger import init_logger

from vllm_saguaro.drafting.buckets import Bucket, branches_for, buckets, default_branches, most_rows_first
from vllm_saguaro.drafting.device_blocks import private_blocks
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.drafting.device_model import NO_PLACE, Piece
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.placement.side_stream import SideStream, side_stream
from vllm_saguaro.placement.stream import StreamDraft
from vllm_saguaro.vllm_hooks.device_draft_model import VllmDeviceModel
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig

logger = init_logger(f"vllm.{__name__}")

USUAL_LENGTH = 2048
"""Tokens of a text that the draft's KV has room for in every slot, where its size is left to us."""

MOST_OF_DEVICE = 0.1
"""Of the device's memory, what the draft's KV takes at most, where its size is left to us."""

A_GRAPH = 1 << 20
"""Bytes that CUDA takes for a graph at least: what vLLM reckons with (`v1/worker/gpu/cudagraph_utils.py`)."""

A_FORWARD_IN_A_GRAPH = 3 << 20
"""Bytes that CUDA takes for a forward in it: 8 KiB for each of some 400 kernels. Assumed; no GPU has measured it."""

_KV_BYTES_ON_CPU = 1 << 30
_LARGEST_BLOCK = 32
"""Tokens a block that the reckoning of a default goes by."""


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What the stream placement is made from.

    model: how the draft is loaded. `device` is the worker's, such as "cuda:0"; `kv_cache_bytes` is the draft's KV, 0
    for a default (`default_kv_tokens`); `max_rows` and `graph_rows` are set here. slots: the runner's max_num_seqs.
    branches: N, or None for `buckets.default_branches`. method and sampling_c: as `DeviceEngine` has them. seed of the
    drafts' own noise; None: a secret from the system.
    """

    model: DraftModelConfig
    slots: int
    num_speculative_tokens: int
    branches: int | None = None
    method: str = "probabilistic"
    sampling_c: float = 1.0
    seed: int | None = None


def _nothing() -> None:
    """Nothing is held back, nobody is told."""


def make_stream_draft(options: StreamOptions, gave_up: Callable[[], None] = _nothing) -> StreamDraft:
    """Load the draft and allocate all that it holds: weights, KV, tables, buffers.

    To be called in the worker before vLLM measures memory (`determine_available_memory`), at best at the end of
    `load_model`: what is allocated then is taken from the target's KV by vLLM itself. What a round needs for a while,
    and its graphs later, is held back until the first request or the capture. `gave_up` is called when an error has
    ended the drafting. ValueError, in one line, where the draft cannot be used so.
    """
    device = torch.device(options.model.device)
    branches = options.branches or default_branches(options.num_speculative_tokens)
    found = buckets(options.slots, branches)
    stream = side_stream(device)
    with stream.entered():
        model = VllmDeviceModel(_model_config(options, branches, found))
        model.warm_up(rows=(most_rows_first(found)[0].rows,))
        engine = DeviceEngine(
            model,
            operations_for(device),
            options.num_speculative_tokens,
            options.slots,
            branches,
            stream.mark,
            method=options.method,
            sampling_c=options.sampling_c,
            seed=options.seed,
        )
        let_go = _hold_back(engine, stream) if device.type == "cuda" else _nothing
    logger.info(
        "Saguaro: the draft drafts on a stream of %s, %s branches a request at most, %d blocks of KV.",
        *(device, branches, model.num_blocks),
    )
    return StreamDraft(engine, stream, let_go, gave_up)


def default_kv_tokens(slots: int, branches: int, max_length: int, num_speculative_tokens: int) -> int:
    """Tokens that the draft's KV is for where its size is left to us: a usual text in every slot, and its branches.

    At least one text of the greatest length, and the branches of a request that is alone.
    """
    private = private_blocks(_LARGEST_BLOCK, num_speculative_tokens) * _LARGEST_BLOCK
    usual = min(max_length, USUAL_LENGTH) + _LARGEST_BLOCK
    many = slots * (usual + branches_for(slots, branches) * private)
    return max(many, max_length + _LARGEST_BLOCK + branches * private)


def _model_config(options: StreamOptions, branches: int, found: list[Bucket]) -> DraftModelConfig:
    config = options.model
    rows = sorted({bucket.rows for bucket in found} | {bucket.batch for bucket in found})
    if not config.kv_cache_bytes:
        tokens = default_kv_tokens(options.slots, branches, config.max_length, options.num_speculative_tokens)
        on_cpu = torch.device(config.device).type == "cpu"
        most = _KV_BYTES_ON_CPU if on_cpu else int(MOST_OF_DEVICE * torch.cuda.mem_get_info(config.device)[1])
        config = replace(config, kv_cache_tokens=tokens, kv_cache_bytes=most)
    return replace(config, max_rows=rows[-1], graph_rows=rows)


def _hold_back(engine: DeviceEngine, stream: SideStream) -> Callable[[], None]:
    """Hold as much memory as the draft's work takes for a while, and its graphs; the call that lets it go.

    vLLM empties torch's cache before it measures, and would give this memory to the target's KV. It is held for the
    draft's stream, whose work then finds it in the cache.

    Without graphs that is what the largest round takes, or the longest piece of a prompt: one is after the other.
    Graphs keep what a round takes in a pool of their own for good, and prompts are read beside it; and CUDA has memory
    for the graphs themselves. (torch empties its cache before each capture, so CUDA finds what is held for those.)
    """
    model, device = engine.model, engine.model.device
    assert stream.cuda is not None
    longest = min(model.max_tokens, model.max_length)
    nowhere = torch.full((longest,), NO_PLACE, dtype=torch.int64, device=device)
    piece = Piece(torch.zeros_like(nowhere), 0, engine.state.main[engine.state.nobody], nowhere)
    engine.idle()
    work = _taken(partial(_all_rounds, engine), device)
    read = _taken(partial(model.read, piece), device)
    held_for = work + read + graph_bytes(engine) if model.captures else max(work, read)
    torch.cuda.empty_cache()
    held = [torch.empty(max(held_for, 1), dtype=torch.uint8, device=device)]
    return held.clear


def graph_bytes(engine: DeviceEngine) -> int:
    """What CUDA may take for the graphs beside their pool: of a look-up and a round for each bucket."""
    a_round = A_GRAPH + (engine.num_speculative_tokens + 1) * A_FORWARD_IN_A_GRAPH
    return len(engine.buckets) * (A_GRAPH + a_round)


def _all_rounds(engine: DeviceEngine) -> None:
    for bucket in most_rows_first(engine.buckets):
        engine.look_up(bucket)
        engine.work(bucket)


def _taken(work: Callable[[], None], device: torch.device) -> int:
    """The bytes that the work takes for a while: without those that stay."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
