"""What a draft side that is not the target's own thread is started with, under either runner, and the mailbox to it.

The start crosses processes as JSON: `draft_process.load_engine` is its reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE
from vllm_saguaro.placement.layout import MailboxShape

KV_BYTES: Final = {"cpu": 1 << 30, "cuda": 8 << 30}
"""KV budget of a draft, by its device. On a CPU its pages are touched only when used: a small load costs little."""
_RING_BYTES: Final = 4 << 20
"""Steps that wait for the draft side, beside one prompt of the greatest length."""


def mailbox_shape(
    config: SaguaroConfig, options: Mapping[str, Any], slots: int, longest: int, device_steps: int = 0
) -> MailboxShape:
    """`options` as the front end wrote them. `longest`: tokens of a text of the target at most. `device_steps`: records
    of the target's device that there is room for, where it writes the outcomes itself.
    """
    return MailboxShape(
        slots=slots,
        branches=config.most_branches,
        num_speculative_tokens=config.num_speculative_tokens,
        ring_bytes=_RING_BYTES + 8 * longest,
        support=SUPPORT,
        vocab_size=options["target_vocab_size"],
        device_steps=device_steps,
    )


def draft_options(
    config: SaguaroConfig, options: Mapping[str, Any], slots: int, cpus: Sequence[int], device: str = "cpu"
) -> dict[str, Any]:
    """What the draft side is told, plain values only: the fields of `DraftModelConfig` under "model", the rest beside.

    `slots`: requests of one engine that may have drafts; a pool has room for those of all its engines. `cpus`: the
    draft's cores, none where they are not ours to say. `device`: the draft's own, "cpu" or such as "cuda:0".
    """
    draft: dict[str, Any] = dict(options["draft"])
    engines = config.draft_pool_engines if config.draft_pool is not None else 1
    model = draft | {
        "max_length": draft.pop("max_model_len"),
        "max_rows": max(MAX_ROWS_A_TREE, engines * slots),
        "kv_cache_bytes": engines * KV_BYTES[device.partition(":")[0]],
        "vocab_size": options["target_vocab_size"],
        "device": device,
    }
    return {
        "model": model,
        "branches": config.most_branches,
        "choose_branches": config.chooses_branches,
        "num_speculative_tokens": config.num_speculative_tokens,
        "fan_out": config.fan_out,
        "draft_sample_method": config.draft_sample_method,
        "sampling_c": config.sampling_c,
        "cpus": list(cpus),
    }
