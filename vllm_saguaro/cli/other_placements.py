"""Which placements `tune` tries beside the one that a start takes by itself, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vllm_saguaro.cli.finding import refused
from vllm_saguaro.cli.placements import Host
from vllm_saguaro.config import PLACEMENTS, SaguaroConfigError, split_options
from vllm_saguaro.device_options import on_device, on_host

_CLIENT: Final = "ray://"


def other_placements(
    host: Host, usual: str, fixed: Mapping[str, Any], cluster: str | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those to try, and the reasons of the others, each in a few words.

    `usual`: what a start takes. `fixed`: the user's keys; where the placement is one of them there is nothing to try.
    `cluster`: what the environment says of a Ray cluster (RAY_ADDRESS).
    """
    if "placement" in fixed:
        return (), {}
    reasons = {name: _why_not(name, host, fixed, cluster) for name in PLACEMENTS if name != usual}
    return tuple(name for name, why in reasons.items() if not why), {name: why for name, why in reasons.items() if why}


def _why_not(name: str, host: Host, fixed: Mapping[str, Any], cluster: str | None) -> str:
    """Empty for a placement that is worth an engine."""
    if why := _refusal(name, host, fixed):
        return why
    if name in ("process", "ray") and host.lacks_gpu:
        return f"needs a GPU beside the target's, and this process sees {host.gpus}"
    if name != "ray":
        return ""
    if host.on_v2:
        return "has its draft on this node with model runner V2, where process does the same without Ray"
    if not cluster:
        return "is on one machine what process is, and RAY_ADDRESS names no cluster"
    return "RAY_ADDRESS is that of a Ray client server" if cluster.startswith(_CLIENT) else ""


def _refusal(name: str, host: Host, fixed: Mapping[str, Any]) -> str:
    """What a start would say to this placement with the user's keys, without what to write instead."""
    from vllm_saguaro.vllm_hooks import compatibility

    options = {**fixed, "placement": name}
    try:
        config, _ = split_options(options)
        if host.on_v2:
            on_device(config, options)
        else:
            on_host(config, options)
        compatibility.check_placement(name)
    except SaguaroConfigError as problem:
        return refused("placement", str(problem)).text.removeprefix(f'placement "{name}" ')
    return ""
