"""The seam to V2's noise (vLLM 0.32, `v1/worker/gpu/sample/gumbel.py`): the target's tokens are decided by it alone.

V2's sampler takes argmax_t (z_t / T + g_t), and g is a function of the request's seed, the position and the token
(`algorithm/position_noise.py`). A request without a seed gets a random one. So a draft that is told the seed knows the
noise of every position to come. vLLM's rejection sampler makes no use of that: it tests p / q with other numbers, and
draws what is left of p with noise of its own. Here each row of a verify pass is drawn as a step without drafts would
draw it, by the same kernel, and drafts are accepted as far as they are what was drawn. The text of a seed is then plain
vLLM's, token by token, and no q is needed.

Where plain vLLM draws with a fused kernel (FlashInfer, with top-k or top-p and without seeds), that has other random
numbers. Here it never does (`marked_sampler.install`): one rule for all tokens.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_saguaro.algorithm.position_noise import gumbel_of_all, stems
from vllm_saguaro.kernels.operations import operations_for

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_TRIED_SEEDS = (0, 1, -1, 123_456_789_012_345, -(2**63), 2**63 - 1)
_TRIED_POSITIONS = (0, 1, 7, 300, 70_000)
_TRIED_TOKENS = 3000

_PROCESSING = (
    "self",
    "logits",
    "expanded_idx_mapping",
    "idx_mapping",
    "idx_mapping_np",
    "pos",
    "input_ids",
    "expanded_local_pos",
    "seq_lens_upper_bound_np",
)
"""Parameters of `Sampler.apply_sampling_params` that are given here, in this order."""


class CoupledSampler(RejectionSampler):
    """vLLM's rejection sampler, in which the target's token is decided before drafts are looked at."""

    @classmethod
    def of(cls, sampler: RejectionSampler) -> CoupledSampler:
        """One with all that the given one has."""
        coupled = cls.__new__(cls)
        coupled.__dict__.update(sampler.__dict__)
        return coupled

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(processed logits [L, V], sampled [B, K + 1] int64, how many count [B] int32) of a chunk of requests.

        `draft_sampled` [L] are the tokens that were fed, `verify_draft_sampled` the same with -1 for what must not be
        accepted. `draft_logits` is not looked at.
        """
        sampler = self.sampler
        processed = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        drawn = gumbel_sample(
            processed,
            expanded_idx_mapping,
            sampler.sampling_states.temperature.gpu,
            sampler.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=sampler.use_fp64_gumbel,
        )
        steps = self.num_speculative_steps
        return processed, *agreed(drawn, verify_draft_sampled, cu_num_logits, expanded_local_pos, steps)


def agreed(
    drawn: Tensor, drafts: Tensor, begins: Tensor, places: Tensor, num_speculative_tokens: int
) -> tuple[Tensor, Tensor]:
    """`algorithm.agreement.agreed`, by the operation of the tensors' device."""
    return operations_for(drawn.device).agreed(drawn, drafts, begins, places, num_speculative_tokens)


def warm_up(device: torch.device, num_speculative_tokens: int) -> None:
    """Compile `agreed` where it is a kernel: now, not as requests wait."""
    begins, drawn = torch.arange(2, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    fed = torch.zeros(1, dtype=torch.int32, device=device)  # as the runner's input ids
    agreed(drawn, fed, begins, begins[:1], num_speculative_tokens)


def noise_is_known(model_config: Any, device: torch.device) -> bool:
    """Whether this vLLM draws with the noise that `algorithm/position_noise.py` describes: asked of vLLM itself.

    Not with noise in double precision, which is another hash; nor where the method that is overridden here, or one of
    those that it calls, has other parameters. It waits for the device, so it is for the start alone.
    """
    ours, theirs = (list(inspect.signature(c._verify).parameters) for c in (CoupledSampler, RejectionSampler))
    processing = tuple(inspect.signature(Sampler.apply_sampling_params).parameters)
    if model_config.use_fp64_gumbel or ours != theirs or processing[: len(_PROCESSING)] != _PROCESSING:
        return False
    try:
        return _draws_as_known(device)
    except (TypeError, RuntimeError):  # a vLLM whose kernel is called in another way
        return False


def _draws_as_known(device: torch.device) -> bool:
    tried = [(seed, position) for seed in _TRIED_SEEDS for position in _TRIED_POSITIONS]
    seeds = torch.tensor([seed for seed, _ in tried], dtype=torch.int64, device=device)
    positions = torch.tensor([position for _, position in tried], dtype=torch.int64, device=device)
    rows = torch.arange(len(tried), dtype=torch.int32, device=device)
    nothing = torch.zeros(len(tried), _TRIED_TOKENS, dtype=torch.float32, device=device)
    drawn = gumbel_sample(
        *(nothing, rows, torch.ones_like(nothing[:, 0]), seeds, positions), apply_temperature=False, is_drafting=False
    )
    # One position more: ours are those of the token that is drawn, vLLM's of the token that was fed
    expected = gumbel_of_all(stems(seeds, positions + 1), _TRIED_TOKENS).argmax(-1)
    return bool((drawn == expected).all())
