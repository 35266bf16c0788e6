from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.gpu_checking.kernel_cases import Sizes, lookup_arguments
from tests.unit.algorithm import device_loops
from vllm_saguaro.algorithm import outcome_lookup

SIZES = st.builds(
    Sizes, slots=st.integers(1, 5), rows=st.integers(0, 5), branches=st.integers(1, 9), drafts=st.integers(1, 5)
)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_lookup_does_what_the_loop_does(sizes: Sizes, seed: int) -> None:
    arguments = lookup_arguments(sizes, torch.Generator().manual_seed(seed))
    got = outcome_lookup.outcome_lookup(*arguments)
    assert tuple(t.tolist() for t in got) == device_loops.outcome_lookup(*arguments)
    assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.int32]


def test_all_rows_miss() -> None:
    arguments = lookup_arguments(Sizes(), torch.Generator().manual_seed(1))
    arguments[0].fill_(-1)
    arguments[5].fill_(-1)
    branch, tokens, ready = outcome_lookup.outcome_lookup(*arguments)
    assert branch.tolist() == [-1] * 3
    assert ready.tolist() == [0] * 3
    assert torch.equal(tokens, arguments[6].unsqueeze(1).expand(-1, 3))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(keys >= 0) & ", ""),
        (".amin(1)", ".amax(1)"),
        ("torch.where(hit, depth[slots], 0)", "depth[slots]"),
        ("torch.where(given, found, bonus.unsqueeze(1))", "found"),
    ],
)
def test_planted_error_is_found(right: str, wrong: str) -> None:
    source = inspect.getsource(outcome_lookup)
    assert source.count(right) == 1
    room: dict[str, Any] = {"__name__": "planted"}
    exec(source.replace(right, wrong), room)
    assert any(_is_wrong(room["outcome_lookup"], seed) for seed in range(60))


def _is_wrong(operation: Any, seed: int) -> bool:
    arguments = lookup_arguments(Sizes(rows=7, width=3), torch.Generator().manual_seed(seed))
    try:
        return tuple(t.tolist() for t in operation(*arguments)) != device_loops.outcome_lookup(*arguments)
    except (RuntimeError, IndexError):
        return True
