"""The options of an engine whose outcomes never reach the host (vLLM's Model Runner V2).

Standard library only, like `config.py`. What needs the outcome on the host is off there, and refused where the user has
written it: a guess or drafts made just in time after a miss, fewer drafts where they do not pay, several drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Final

from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError

DEVICE_PLACEMENTS: Final = ("stream", "process", "ray")


def on_device(config: SaguaroConfig, written: Container[str], default_placement: str = "stream") -> SaguaroConfig:
    """The same options for runner V2; `written`: the keys that the user wrote, all others are defaults.

    Raises `SaguaroConfigError` for what cannot be had there.
    """
    if "placement" in written and config.placement not in DEVICE_PLACEMENTS:
        raise SaguaroConfigError(
            f'placement "{config.placement}" needs each outcome on the host, which model runner V2 does not have: '
            'write "stream", "process" or "ray", or leave it out'
        )
    placement = config.placement if "placement" in written else default_placement
    if config.backup in ("ngram", "jit"):
        raise SaguaroConfigError(
            f'backup "{config.backup}" needs each outcome on the host, which model runner V2 does not have: write '
            '"none", or leave it out'
        )
    if config.adaptive:
        raise SaguaroConfigError(
            "adaptive true needs each outcome on the host, which model runner V2 does not have: leave it out"
        )
    if config.draft_replicas > 1:
        raise SaguaroConfigError(
            f"draft_replicas is {config.draft_replicas}, model runner V2 has one draft: leave it out"
        )
    if placement == "stream" and config.draft_cpus is not None:
        raise SaguaroConfigError(
            'draft_cpus with placement "stream": the draft computes on the target\'s device; leave it out, or write '
            '"placement": "process"'
        )
    if placement == "stream" and config.fan_out != "ranked":
        raise SaguaroConfigError(
            f'fan_out "{config.fan_out}" with placement "stream": branches go to the likeliest outcomes there; write '
            '"ranked", or leave it out'
        )
    if placement != "stream":
        _refuse_gpu_memory(written)
    return dataclasses.replace(config, placement=placement, backup="none", adaptive=False)


def on_host(config: SaguaroConfig, written: Container[str]) -> SaguaroConfig:
    """The options for runner V1, as they are. Raises `SaguaroConfigError` for what only a device has."""
    if config.placement == "stream":
        raise SaguaroConfigError(
            'placement "stream" drafts on a GPU with model runner V2, this is vLLM\'s CPU backend with runner V1: '
            'write "process", or leave it out'
        )
    _refuse_gpu_memory(written)
    return config


def _refuse_gpu_memory(written: Container[str]) -> None:
    if "draft_gpu_memory" in written:
        raise SaguaroConfigError(
            'draft_gpu_memory goes with placement "stream" alone: write "placement": "stream" too, or leave it out'
        )
