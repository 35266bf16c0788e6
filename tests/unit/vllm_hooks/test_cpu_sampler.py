from __future__ import annotations

import pytest
import torch

from vllm_saguaro.vllm_hooks.cpu_sampler import expand


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_entry_is_repeated_for_its_tokens_in_its_own_type(dtype: torch.dtype) -> None:
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, torch.tensor([7, 0, 9], dtype=dtype), torch.tensor([2, 5, 6]), 0, 3)
    assert output.tolist() == [7, 7, 3, 3, 3, 9]


def test_a_row_without_tokens_is_left_out() -> None:
    output = torch.empty(3)
    expand(output, torch.tensor([0.5, 0.7, 0.9]), torch.tensor([2, 2, 3]), 0, 0)
    assert torch.equal(output, torch.tensor([0.5, 0.5, 0.9]))
