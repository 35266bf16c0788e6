"""What Ray is asked for, from what the user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vllm_saguaro import cores
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.placement.ray_channel import RayDraft, cluster_address

MODULE: Final = "vllm_saguaro.vllm_hooks.draft_process"
_SETTINGS: Final = ("VLLM_", "HF_", "HUGGING_FACE_")
"""Environment variables that configure vLLM and its hub, which the draft should have as the target has them."""
_OF_THIS_PROCESS: Final = ("VLLM_HOST_IP", "VLLM_PORT", "VLLM_DP_", "VLLM_RPC_")


def check_cluster(config: SaguaroConfig) -> str | None:
    """The cluster to use; None: one of our own. Raises `SaguaroConfigError` for a pool without a cluster."""
    address = cluster_address((config.ray_options or {}).get("address"))
    if config.draft_pool is not None and address is None:
        raise SaguaroConfigError(
            f'draft_pool "{config.draft_pool}" is for the engines of one Ray cluster, and this one is in none: write '
            '"ray_options": {"address": "auto"} or HOST:PORT of its head, or leave draft_pool out'
        )
    return address


def ray_draft(
    config: SaguaroConfig,
    options: Mapping[str, Any],
    plan: Mapping[str, Any],
    environment: Mapping[str, str],
    slots: int = 0,
    again: bool = False,
    number: int = 0,
) -> RayDraft:
    """`options`: those of `load_engine`. `plan`: the cores, as `CorePlan.to_dict` has them. `environment`: of this
    process. `slots`: requests that the draft may have. `again`: it is not the first life, so that the target decodes
    meanwhile. `number`: of several drafts this one. Raises `SaguaroConfigError` for a pool without a cluster.
    """
    asked = dict(config.ray_options or {})
    address = check_cluster(config)
    cpus: list[int] = plan["draft"]
    cleaned = cores.draft_environment(dict(environment), cpus)
    return RayDraft(
        MODULE,
        options,
        cpus,
        num_cpus=asked.get("num_cpus", len(cpus)),
        num_gpus=asked.get("num_gpus", 0),
        resources=asked.get("resources", {}),
        runtime_env=asked.get("runtime_env"),
        namespace=asked.get("namespace"),
        address=address,
        # At the first start the target's cores have time to spare, and Ray takes long to come up on one alone.
        daemon_cpus=sorted(cpus if again and cpus else {*plan["target"], *cpus}),
        variables={
            name: value
            for name, value in cleaned.items()
            if name.startswith(_SETTINGS) and not name.startswith(_OF_THIS_PROCESS)
        },
        pool=config.draft_pool,
        engines=config.draft_pool_engines,
        slots=slots,
        tells_that_it_waits=again or number == 0,
    )
