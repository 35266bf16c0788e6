"""Which vLLM this is, and whether its seams are the ones we know. Asked only when the method is asked for.

The hooks replace or override what vLLM does not promise to keep. So each thing that they take hold of stands in one
table with the signature it must have; a vLLM that differs is refused with one line rather than met with a stack trace
later.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vllm_saguaro.config import SaguaroConfigError

SUPPORTED: Final = ((0, 32), (0, 33))
SUPPORTED_RANGE: Final = "vLLM 0.32 and 0.33"
OLDEST_RAY: Final = (2, 50)

FRONTEND: Final = "frontend"
WORKER: Final = "worker"
DEVICE_WORKER: Final = "device worker"


class Runner(StrEnum):
    """vLLM's two model runners."""

    V1 = "V1"
    """Outcomes are lists on the host. Served on the CPU."""
    V2 = "V2"
    """Outcomes stay on the device. Served on CUDA, and on a CPU that has a Triton."""


@dataclass(frozen=True)
class Seam:
    """One function of vLLM that a hook relies on, and the parameter names it must have.

    `where` says in which process it is used, hence where it is checked: importing the model runner into an API server
    only to look at it would cost every start a few seconds. `newer`: what 0.33 has behind those.
    """

    where: str
    module: str
    name: str
    parameters: tuple[str, ...]
    newer: tuple[str, ...] = ()


SEAMS: Final = (
    Seam(
        FRONTEND,
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
    ),
    Seam(FRONTEND, "vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",)),
    Seam(
        WORKER,
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.propose_draft_token_ids",
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
    ),
    Seam(WORKER, "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.take_draft_token_ids", ("self",)),
    Seam(FRONTEND, "vllm.sampling_params", "SamplingParams._validate_spec_decode", ("self", "speculative_config")),
    Seam(
        WORKER, "vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata")
    ),
    Seam(
        WORKER,
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
    ),
    Seam(
        WORKER,
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.apply_logits_processors",
        ("self", "logits", "sampling_metadata", "metadata"),
    ),
    Seam(
        WORKER,
        "vllm.v1.sample.ops.topk_topp_sampler",
        "TopKTopPSampler.forward_cpu",
        ("self", "logits", "generators", "k", "p"),
    ),
    Seam(WORKER, "vllm.v1.worker.gpu_worker", "Worker._make_model_runner", ("self",)),
    Seam(WORKER, "vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",)),
    Seam(
        DEVICE_WORKER,
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator.propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
            "dp_sync_state",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "mm_inputs",
            "is_profile",
            "num_speculative_tokens",
        ),
    ),
    Seam(
        DEVICE_WORKER,
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
        "RejectionSampler.__call__",
        ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
    ),
    Seam(
        DEVICE_WORKER,
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
    ),
    Seam(
        DEVICE_WORKER,
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.postprocess_sampled",
        ("self", "idx_mapping", "sampled_tokens", "num_sampled", "num_rejected", "query_start_loc"),
        newer=("draft_tokens",),
    ),
    Seam(DEVICE_WORKER, "vllm.v1.worker.gpu_worker", "Worker.init_device", ("self",)),
    Seam(DEVICE_WORKER, "vllm.v1.worker.gpu_worker", "Worker.initialize_from_config", ("self", "kv_cache_config")),
    Seam(DEVICE_WORKER, "vllm.v1.worker.gpu_worker", "Worker.execute_model", ("self", "scheduler_output")),
)


def check_version(found: str | None = None) -> None:
    """Refuse a vLLM that this plugin has not been read against."""
    if found is None:
        found = str(getattr(importlib.import_module("vllm"), "__version__", "unknown"))
    match = re.match(r"v?(\d+)\.(\d+)(?:\D|$)", found)
    if match is None or (int(match[1]), int(match[2])) not in SUPPORTED:
        raise SaguaroConfigError(
            f'method "saguaro" works with {SUPPORTED_RANGE}, this is vLLM {found}: install one of them '
            "(or the vllm_saguaro made for this one)"
        )


def check_seams(where: str, seams: tuple[Seam, ...] = SEAMS) -> None:
    """Compare the table with what is installed, for one kind of process."""
    for seam in seams:
        if seam.where != where:
            continue
        found = _parameters(seam)
        if found not in (seam.parameters, seam.parameters + seam.newer):
            is_now = f"is ({', '.join(found)})" if found is not None else "is missing"
            raise SaguaroConfigError(
                f'method "saguaro" does not know this build of vLLM: {seam.module}.{seam.name} {is_now}, expected '
                f"({', '.join(seam.parameters)}); install an unmodified {SUPPORTED_RANGE}"
            )


def check_platform() -> Runner:
    """Which model runner vLLM will take here; refuse the platforms and runners that this release has nothing for.

    vLLM takes V2 where it is told to, and by default where it has a Triton. The worker asks again, when all that may
    decide for the other runner is known.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    wish = envs.VLLM_USE_V2_MODEL_RUNNER
    if current_platform.is_cuda():
        if wish is False:
            raise SaguaroConfigError(
                "vllm_saguaro runs on model runner V2 on a GPU: unset the environment variable "
                "VLLM_USE_V2_MODEL_RUNNER, or set it to 1"
            )
        if not HAS_TRITON:
            raise SaguaroConfigError(
                "vllm_saguaro runs on model runner V2 on a GPU, which needs Triton, and vLLM finds none: install the "
                "triton that belongs to this torch"
            )
        return Runner.V2
    if not current_platform.is_cpu():
        raise SaguaroConfigError(
            f"this release of vllm_saguaro runs on CUDA and on vLLM's CPU backend, this is "
            f'"{current_platform.device_type}": write method "draft_model" here'
        )
    if wish is None and HAS_TRITON:
        raise SaguaroConfigError(
            "vllm_saguaro runs on vLLM's model runner V1 on a CPU: set the environment variable "
            "VLLM_USE_V2_MODEL_RUNNER=0 (with 1 it runs on V2, as its GPU path is tested)"
        )
    return Runner.V2 if wish else Runner.V1


def check_combination(
    engine_args: Any, parallel: Any, worker_class: str, placement: str, runner: Runner = Runner.V1
) -> None:
    """Refuse what this version cannot be combined with."""
    for name in (
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "nnodes",
    ):
        if (size := getattr(parallel, name, 1)) > 1:
            raise SaguaroConfigError(
                f'method "saguaro" serves a target on one machine, divided by tensor parallelism alone, {name} is '
                f"{size}: write {name} 1, or another method"
            )
    _check_executor(parallel)
    if placement == "inline" and (size := parallel.tensor_parallel_size) > 1:
        raise SaguaroConfigError(
            f'placement "inline" drafts inside the one rank of a target, tensor_parallel_size is {size}: '
            'write placement "process"'
        )
    if parallel.worker_cls not in ("auto", worker_class):
        raise SaguaroConfigError(
            f'method "saguaro" brings its own worker class, worker_cls is {parallel.worker_cls!r} already: '
            "leave worker_cls out"
        )
    if runner is Runner.V2:
        _check_v2_combination(engine_args, parallel)
    elif getattr(engine_args, "async_scheduling", None):
        raise SaguaroConfigError(
            'method "saguaro" reads each outcome on the host and cannot go with async_scheduling: leave it out'
        )


def _check_executor(parallel: Any) -> None:
    """Refuse vLLM's Ray executor where vLLM itself would, but before a Ray is started and with one line.

    It asks Ray for a resource of the platform's, and vLLM names one for GPUs alone (0.32: `v1/executor/ray_utils.py`,
    `initialize_ray_cluster`, and `platforms/interface.py`, `ray_device_key`).
    """
    from vllm.platforms import current_platform

    if parallel.distributed_executor_backend == "ray" and not current_platform.ray_device_key:
        raise SaguaroConfigError(
            f'vLLM cannot put workers of "{current_platform.device_type}" into Ray, and distributed_executor_backend '
            'is "ray": write "mp", or leave it out. The draft alone can be in Ray: "placement": "ray"'
        )


def _check_v2_combination(engine_args: Any, parallel: Any) -> None:
    if parallel.enable_batch_sharded_sampling:
        raise SaguaroConfigError(
            "the draft's q is on the first rank, which samples for all, and enable_batch_sharded_sampling has every "
            "rank sample requests of its own: leave it out"
        )
    if parallel.use_ubatching:
        raise SaguaroConfigError(
            'method "saguaro" does not go with dual batch overlap: leave out enable_dbo and ubatch_size'
        )
    if getattr(engine_args, "watermark_config", None) is not None:
        raise SaguaroConfigError('method "saguaro" does not go with watermark_config: leave it out')


def check_placement(placement: str) -> None:
    """Refuse a placement that something is missing for. Nobody else is asked for Ray."""
    if placement != "ray":
        return
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise SaguaroConfigError(
            'placement "ray" needs Ray, which is not installed here: pip install ".[ray]" in a checkout of '
            'vllm_saguaro, or write "placement": "process"'
        ) from None
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise SaguaroConfigError(
            f'placement "ray" works with Ray {oldest} or newer, this is {found}: pip install ".[ray]" in a checkout of '
            "vllm_saguaro"
        )


def one_line(error: Exception) -> str:
    """What an error of vLLM, pydantic or the hub client says, on one line."""
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic
        parts = []
        for detail in details():
            where = ".".join(str(part) for part in detail.get("loc", ()))
            message = str(detail.get("msg", "")).removeprefix("Value error, ")
            parts.append(f"{where}: {message}" if where else message)
        return " ".join("; ".join(parts).split())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":.") if lines else type(error).__name__


def _parameters(seam: Seam) -> tuple[str, ...] | None:
    """The parameter names of a seam as installed (our own wrappers are seen through), or None where it is not there."""
    try:
        found: object = importlib.import_module(seam.module)
        for part in seam.name.split("."):
            found = getattr(found, part)
        return tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
