from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample import rejection_sampler

from vllm_saguaro.vllm_hooks.cpu_sampler import expand, mend


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_entry_is_repeated_for_its_tokens_in_its_own_type(dtype: torch.dtype) -> None:
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, torch.tensor([7, 0, 9], dtype=dtype), torch.tensor([2, 5, 6]), 0, 3)
    assert output.tolist() == [7, 7, 3, 3, 3, 9]


def test_a_row_without_tokens_is_left_out() -> None:
    output = torch.empty(3)
    expand(output, torch.tensor([0.5, 0.7, 0.9]), torch.tensor([2, 2, 3]), 0, 0)
    assert torch.equal(output, torch.tensor([0.5, 0.5, 0.9]))


def runner() -> tuple[Any, list[Any]]:
    """A runner whose `_sample` notes which metadata it was given."""
    seen: list[Any] = []
    return SimpleNamespace(_sample=lambda logits, metadata: seen.append(metadata)), seen


def test_a_step_without_a_single_draft_goes_to_the_ordinary_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_sampler, "expand_kernel", None)
    made, seen = runner()
    mend(made)
    some, none = SimpleNamespace(num_draft_tokens=[0, 2]), SimpleNamespace(num_draft_tokens=[0, 0])
    for metadata in (some, none, None):
        made._sample(torch.zeros(2, 3), metadata)
    assert seen == [some, None, None]


@pytest.mark.usefixtures("worker_kernels")
def test_vllms_own_call_of_the_kernel_ends_in_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `expand_batch_to_tokens`, with a type for which the kernel of 0.32 writes nothing."""

    def before(*args: Any) -> None:
        raise AssertionError("the kernel that was there before")

    monkeypatch.setattr(rejection_sampler.expand_kernel, "_impl", before)
    with pytest.raises(AssertionError, match="before"):
        rejection_sampler.expand_batch_to_tokens(torch.ones(1), torch.tensor([1], dtype=torch.int32), 1)
    mend(runner()[0])
    counts = torch.tensor([2, 3, 3], dtype=torch.int32)
    expanded = rejection_sampler.expand_batch_to_tokens(torch.tensor([0.5, 0.0, 0.9]), counts, 3, 0, 1)
    assert torch.equal(expanded, torch.tensor([0.5, 0.5, 1.0]))


def test_a_kernel_that_triton_runs_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(_impl="triton's own")
    monkeypatch.setattr(rejection_sampler, "expand_kernel", kernel)
    mend(runner()[0])
    assert kernel._impl == "triton's own"
