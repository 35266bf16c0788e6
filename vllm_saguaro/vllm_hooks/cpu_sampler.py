"""Faults of the verification of vLLM 0.32 on the CPU, kept from those who ask for us; `draft_model` has them too.

1. `utils/cpu_triton_utils.py`, `_expand_kernel_impl`: the result of the C++ kernel stays in a converted copy, so for
   any tensor that is not int64 `expand_batch_to_tokens` returns uninitialised memory. Temperatures, top-k and top-p at
   the drafts' positions are then garbage, for greedy rows too as soon as one row of the batch samples.
2. `v1/worker/gpu_model_runner.py`, `_sample`: a step without a single draft goes through the rejection sampler as well,
   whose top-k then fails on empty logits, which ends the engine.
3. `v1/core/sched/scheduler.py`: drafts of -1 as padding, see `engine_args.py`.

1 and 2 are mended here (1 for the whole process: a later engine in it has the right kernel too), in vLLM's own stand-in
for the kernel and on the runner that is ours. vLLM's door for replacing kernels, `register_kernels`, looks through all
loaded modules and fails at those of llvmlite, wherever something has loaded numba.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.sample import rejection_sampler

if TYPE_CHECKING:
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def mend(runner: GPUModelRunner) -> None:
    """Mend faults 1 and 2 for a runner that has been made."""
    mend_kernel()
    runner._sample = functools.partial(_sample, runner._sample)


def mend_kernel() -> None:
    """Mend fault 1."""
    kernel = rejection_sampler.expand_kernel
    if isinstance(kernel, KernelOverride):  # else Triton runs the kernel itself, which is right
        kernel._impl = expand


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each entry of `input_val` [B] for its tokens, into `output` [T]; `cu_num_tokens` [B] counts them up.

    Entries equal to `replace_from` become `replace_to`. Parameters in the order of the kernel's.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(torch.where(input_val == replace_from, replace_to, input_val).repeat_interleave(counts))


def _sample(original: Any, logits: torch.Tensor | None, metadata: SpecDecodeMetadata | None) -> Any:
    """Where no row has a draft, `logits` has one row a request, and the ordinary sampler is right."""
    return original(logits, metadata if metadata is not None and any(metadata.num_draft_tokens) else None)
