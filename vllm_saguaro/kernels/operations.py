"""The operations of the device as one bundle: Triton kernels on a GPU, their twins in PyTorch elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.algorithm import (
    agreement,
    branch_step,
    branch_tables,
    outcome_ranking,
    outcome_settling,
    position_noise,
    step_outcomes,
    step_records,
)


@dataclass(frozen=True, slots=True)
class Operations:
    """What is done to tables and keys on the device: between passes of the draft model, and in a step of the target.

    Each has the arguments, the results and the promises (static shapes, no waiting) of the function of the same name in
    `algorithm/`.
    """

    settle_outcomes: Callable[..., None]
    ranked_outcomes: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]
    fork: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]
    adopt: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    branch_step: Callable[[Tensor, Tensor, Tensor, int, int, Tensor, Tensor, Tensor], None]
    add_noise: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    copy_rows: Callable[[Tensor, Tensor], Tensor]
    copy_branches: Callable[[Tensor, Tensor, Tensor], Tensor]
    take_drafts: Callable[..., None]
    seal_record: Callable[[Tensor, int, int, int, int], None]
    agreed: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    gather_outcomes: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    book_drafts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]


TWINS = Operations(
    settle_outcomes=outcome_settling.settle_outcomes,
    ranked_outcomes=outcome_ranking.ranked_outcomes,
    fork=branch_tables.fork,
    copy_blocks=branch_tables.copy_blocks,
    adopt=branch_tables.adopt,
    branch_step=branch_step.branch_step,
    add_noise=position_noise.add_noise,
    copy_rows=step_records.copy_rows,
    copy_branches=step_records.copy_branches,
    take_drafts=step_records.take_drafts,
    seal_record=step_records.seal_record,
    agreed=agreement.agreed,
    gather_outcomes=step_outcomes.gather_outcomes,
    book_drafts=step_outcomes.book_drafts,
)


@functools.cache
def operations_for(device: torch.device) -> Operations:
    """The operations for tensors on that device.

    Raises ImportError on a GPU where Triton is missing.
    """
    return triton_kernels() if device.type == "cuda" else TWINS


def triton_kernels() -> Operations:
    """The operations as Triton kernels, whatever the device. Raises ImportError where Triton is missing."""
    # Here, not above: a machine without a GPU may have no Triton, and needs none
    from vllm_saguaro.kernels import agreement as agreeing
    from vllm_saguaro.kernels import branch_step as step
    from vllm_saguaro.kernels import branch_tables as tables
    from vllm_saguaro.kernels import outcome_ranking as ranking
    from vllm_saguaro.kernels import outcome_settling as settling
    from vllm_saguaro.kernels import position_noise as noise
    from vllm_saguaro.kernels import step_outcomes as outcomes
    from vllm_saguaro.kernels import step_records as records

    return Operations(
        settle_outcomes=settling.settle_outcomes,
        ranked_outcomes=ranking.ranked_outcomes,
        fork=tables.fork,
        copy_blocks=tables.copy_blocks,
        adopt=tables.adopt,
        branch_step=step.branch_step,
        add_noise=noise.add_noise,
        copy_rows=records.copy_rows,
        copy_branches=records.copy_branches,
        take_drafts=records.take_drafts,
        seal_record=records.seal_record,
        agreed=agreeing.agreed,
        gather_outcomes=outcomes.gather_outcomes,
        book_drafts=outcomes.book_drafts,
    )
