"""Which `DeviceDraft` a worker with runner V2 gets, by `placement`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_saguaro import counters
from vllm_saguaro.config import AUTO, SaguaroConfig
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig
from vllm_saguaro.vllm_hooks.process_draft import open_process_draft
from vllm_saguaro.vllm_hooks.stream_draft import StreamOptions, make_stream_draft

if TYPE_CHECKING:
    import torch

    from vllm_saguaro.counters import CounterPage
    from vllm_saguaro.device_messages import DeviceDraft

_GIB = 1 << 30


def open_device_draft(
    options: dict[str, Any], slots: int, longest: int, device: torch.device, page: CounterPage
) -> DeviceDraft:
    """Load the draft, and allocate all that it holds for `slots` requests; `options` as the front end wrote them.

    `longest`: tokens of a text of the target at most. Raises what loading raises.
    """
    config = SaguaroConfig.from_dict(options)
    if config.placement == "stream":
        return _on_stream(config, options, slots, device, page)
    return open_process_draft(options, slots, device, longest, page, operations_for(device))


def _on_stream(
    config: SaguaroConfig, options: dict[str, Any], slots: int, device: torch.device, page: CounterPage
) -> DeviceDraft:
    def gave_up() -> None:
        page.set(counters.DRAFT_UP, 0)
        page.set(counters.DRAFT_LEFT_OFF, 1)

    draft: dict[str, Any] = dict(options["draft"])
    model = DraftModelConfig(
        **draft
        | {
            "max_length": draft.pop("max_model_len"),
            "max_rows": slots,
            "kv_cache_bytes": int((config.draft_gpu_memory or 0) * _GIB),
            "vocab_size": options["target_vocab_size"],
            "device": str(device),
        }
    )
    return make_stream_draft(
        StreamOptions(
            model=model,
            slots=slots,
            num_speculative_tokens=config.num_speculative_tokens,
            branches=None if config.branches == AUTO else int(config.branches),
            method=config.draft_sample_method,
            sampling_c=1.0 if config.sampling_c == AUTO else float(config.sampling_c),
        ),
        gave_up,
    )
