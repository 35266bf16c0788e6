"""Tensor parallelism (vLLM 0.32 and 0.33): every rank emits the tokens that the first one sampled.

In vLLM all ranks sample, each for itself, from the same gathered logits, and each keeps the text by its own result:
the scheduler hears the first alone. Here that would go wrong, because the sampler is given what only the rank beside
the draft knows: the q of the drafts, and the keys of requests without a seed. So the first rank samples as if it were
the only one, and the others take its tokens instead of sampling: int32 [rows, columns], whose shape all know. Then
neither noise nor generators nor q need be equal, and what is exact on one rank is exact on all.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import SamplerOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def install(runner: GPUModelRunner, group: GroupCoordinator) -> None:
    """Wrap the `_sample` of a runner whose sampler is in place, on each rank of the tensor-parallel `group`."""
    if group.world_size > 1:
        sample = _lead if group.rank_in_group == 0 else _follow
        runner._sample = functools.partial(sample, runner, group, runner._sample)


def _lead(
    runner: GPUModelRunner,
    group: GroupCoordinator,
    original: Callable[..., SamplerOutput],
    logits: torch.Tensor | None,
    metadata: SpecDecodeMetadata | None,
) -> SamplerOutput:
    """Sample, and tell the other ranks."""
    output = original(logits, metadata)
    tokens, shape = output.sampled_token_ids, _shape(runner, metadata)
    if tokens.dtype != torch.int32 or tuple(tokens.shape) != shape:
        raise RuntimeError(f"vllm_saguaro: sampled {tokens.dtype} {tuple(tokens.shape)}, expected int32 {shape}")
    group.broadcast(tokens.contiguous())
    return output


def _follow(
    runner: GPUModelRunner,
    group: GroupCoordinator,
    original: Any,
    logits: torch.Tensor | None,
    metadata: SpecDecodeMetadata | None,
) -> SamplerOutput:
    """Take what the first rank sampled. Log-probabilities are asked of that rank alone."""
    tokens = torch.empty(_shape(runner, metadata), dtype=torch.int32, device=runner.device)
    return SamplerOutput(sampled_token_ids=group.broadcast(tokens), logprobs_tensors=None)


def _shape(runner: GPUModelRunner, metadata: SpecDecodeMetadata | None) -> tuple[int, int]:
    """Rows and columns of the sampled tokens of a step: as many as the longest row of drafts, and the bonus token."""
    if metadata is None or not any(metadata.num_draft_tokens):
        return runner.input_batch.num_reqs, 1
    return runner.input_batch.num_reqs, metadata.max_spec_len + 1
