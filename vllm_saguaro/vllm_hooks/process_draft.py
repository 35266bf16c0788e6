"""The process placement under runner V2: a draft process of its own, on a GPU of its own, or its Ray actor.

The draft side is the one of runner V1 (`draft_process.py`), told of outcomes by the target's device.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_saguaro import cores, counters
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.process import ProcessChannel
from vllm_saguaro.placement.ray_channel import RayChannel
from vllm_saguaro.placement.restarting import RestartingChannel
from vllm_saguaro.vllm_hooks.draft_options import draft_options, mailbox_shape
from vllm_saguaro.vllm_hooks.ray_draft import MODULE, check_cluster, ray_draft

if TYPE_CHECKING:
    from vllm_saguaro.counters import CounterPage
    from vllm_saguaro.placement.device_step import StepOperations

logger = init_logger(f"vllm.{__name__}")

STEPS: Final = 64
"""Records that there is room for: the draft side may be so many steps behind, in a long forward, and lose nothing."""


def open_process_draft(
    options: Mapping[str, Any],
    slots: int,
    device: torch.device,
    longest: int,
    page: CounterPage,
    operations: StepOperations,
) -> MailboxDraft:
    """Start the draft side and wait until it has loaded; `options` as the front end wrote them, `slots` of the runner.

    `device`: the target's. `longest`: tokens of a text of the target at most. `operations`: those for `device`.

    Raises `SaguaroConfigError` where no GPU is left for the draft, `DraftFailed` when it does not come up.
    """
    config = SaguaroConfig.from_dict(options)
    plan = options["cores"] or {"draft": [], "target": []}
    cpus: list[int] = plan["draft"]
    shape = mailbox_shape(config, options, slots, longest, STEPS)
    # The draft process sees one GPU, its own.
    told = draft_options(config, options, slots, cpus, "cuda:0" if device.type == "cuda" else "cpu")
    environment = _environment(config, cpus, device)

    lives = itertools.count()

    def start() -> ProcessChannel | RayChannel:
        again = next(lives) > 0
        with cores.born_on(cpus):
            if config.placement == "ray":
                draft = ray_draft(_with_gpu(config, device), told, plan, environment, slots, again)
                return RayChannel(draft, shape, environment)
            return ProcessChannel(MODULE, told, shape, environment)

    channel = RestartingChannel(start, config.draft_restarts, page, logger, hits=lambda: page.value(counters.HITS))
    try:
        draft = MailboxDraft(
            channel, shape, device, operations, logger, with_q=config.draft_sample_method == "probabilistic"
        )
        draft.wait_until_ready()
    except BaseException:
        channel.close()
        raise
    return draft


def _environment(config: SaguaroConfig, cpus: Sequence[int], device: torch.device) -> dict[str, str]:
    """The draft's whole environment: the target's, but for its own cores and its own GPU, and no runner's choice."""
    environment = cores.draft_environment(dict(os.environ), cpus or [0])
    # The draft has no runner; where Triton is missing vLLM would refuse.
    environment.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    # A Ray of our own would give its actor the target's: it knows of no target. That of a cluster runs already.
    if device.type == "cuda" and (config.placement != "ray" or check_cluster(config) is None):
        free = free_gpus(os.environ, torch.cuda.device_count(), _targets(device), config.placement)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(free) if config.placement == "ray" else free[0]
    return environment


def _targets(device: torch.device) -> Sequence[int]:
    """Numbers of the GPUs that the target has, as this process sees them: not the first ones with `--device-ids`."""
    ranks = get_tp_group().world_size if parallel_state.model_parallel_is_initialized() else 1
    if ranks == 1:
        return [device.index or 0]
    return [current_platform.logical_device_id_to_visible_device_id(rank) for rank in range(ranks)]


def free_gpus(
    environment: Mapping[str, str], count: int, targets: Collection[int], placement: str = "process"
) -> list[str]:
    """Of `count` visible GPUs those that are none of the `targets`, as `CUDA_VISIBLE_DEVICES` names them.

    Raises `SaguaroConfigError` where there are none.
    """
    others = [index for index in range(count) if index not in targets]
    if not others:
        raise SaguaroConfigError(
            f'placement "{placement}" needs a GPU beside the target\'s {len(targets)}, and this process sees {count}: '
            'make another one visible (CUDA_VISIBLE_DEVICES), or write "placement": "stream"'
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(count)))
    return [names[index].strip() for index in others]


def _with_gpu(config: SaguaroConfig, device: torch.device) -> SaguaroConfig:
    """Ask Ray for a GPU where the user asked for no number of them."""
    if device.type != "cuda":
        return config
    return dataclasses.replace(config, ray_options={"num_gpus": 1, **(config.ray_options or {})})
