"""The seam to V2's rejection sampler (vLLM 0.32 and 0.33, `v1/worker/gpu/spec_decode/rejection_sampler.py`).

Under runner V2 every request verifies as many drafts as were scheduled, whether the draft side had them or not. Those
that it had not are filler: valid token ids that nobody drafted. vLLM's sampler has a mask for drafts that must not be
accepted (it was made for grammars): at the first of them verification stops, and the token is drawn from p itself, not
from the residual (`_rejection_kernel`, `_resample_kernel`). So filler is exact at every temperature, whatever it is.
Coupled drafts have a sampler of their own inside (`coupled_sampler.py`), which heeds the same mask.

Row layout: the logits of a request are one row for the last token and one for each draft, `expanded_local_pos` 0, 1, ..
K. Row i carries the i-th draft (counted from 1) as its input, and the mask is read there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_saguaro.vllm_hooks.coupled_sampler import CoupledSampler, warm_up

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput


class MarkedSampler:
    """vLLM's rejection sampler, told which drafts are filler. Everything else of it is reached through."""

    def __init__(self, sampler: RejectionSampler, ready: Tensor) -> None:
        """`ready` [R] int32, by request slot: how many of the drafts under verification are real."""
        self._sampler = sampler
        self._ready = ready

    def __call__(
        self,
        logits: Tensor,
        input_batch: InputBatch,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> SamplerOutput:
        """Verify a step; `invalid_drafts` [rows of logits] bool are vLLM's own. Enqueues only."""
        filler = input_batch.expanded_local_pos > self._ready[input_batch.expanded_idx_mapping]
        if invalid_drafts is not None:
            filler = filler | invalid_drafts
        return self._sampler(logits, input_batch, draft_logits, filler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def install(runner: GPUModelRunner, ready: Tensor, coupled: bool) -> None:
    """Put ours around the sampler of a runner that has loaded its target.

    `coupled`: drafts are what the target's own noise picks. Then all its tokens must be decided by that noise, too.
    vLLM's test would draw what is left of p with the numbers that a draft came from, and be wrong. And vLLM's fused
    samplers, for steps without drafts, have other numbers: where a grammar leaves a step none of its drafts, which
    numbers count would depend on what was drafted. Raises RuntimeError for a sampler that is not vLLM's own.
    """
    sampler = runner.rejection_sampler
    if not isinstance(sampler, RejectionSampler):
        raise RuntimeError(f"vllm_saguaro: expected vLLM's own V2 rejection sampler, found {type(sampler)}")
    if coupled:
        if type(sampler) is not RejectionSampler:
            raise RuntimeError(
                f"vllm_saguaro: the model verifies drafts with {type(sampler)}, which coupled drafts do not go with: "
                'write "draft_sample_method": "probabilistic"'
            )
        sampler.sampler.use_flashinfer = sampler.sampler.use_xpu_sampler = False
        sampler = CoupledSampler.of(sampler)
        warm_up(ready.device, sampler.num_speculative_steps)
    runner.rejection_sampler = MarkedSampler(sampler, ready)
