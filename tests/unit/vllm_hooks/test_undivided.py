"""A draft inside a rank: what vLLM's layers find as their tensor-parallel group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed import parallel_state

from vllm_saguaro.vllm_hooks.undivided import undivided


def groups(monkeypatch: pytest.MonkeyPatch, tensor: int | None, pipeline: int) -> Any:
    group = None if tensor is None else SimpleNamespace(world_size=tensor, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "_TP", group)
    monkeypatch.setattr(
        parallel_state, "_PP", None if tensor is None else SimpleNamespace(world_size=pipeline, rank_in_group=0)
    )
    return group


def test_layers_of_a_draft_find_one_rank_and_those_of_the_target_all(monkeypatch: pytest.MonkeyPatch) -> None:
    group = groups(monkeypatch, 4, 1)
    with undivided():
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        with undivided():
            assert parallel_state.get_tensor_model_parallel_rank() == 0
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_tp_group() is group


def test_an_error_inside_leaves_the_target_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    group = groups(monkeypatch, 2, 1)
    with pytest.raises(KeyError), undivided():
        raise KeyError
    assert parallel_state.get_tp_group() is group


@pytest.mark.parametrize("size", [None, 1])
def test_where_nothing_is_divided_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    group = groups(monkeypatch, size, 1)
    with undivided():
        assert parallel_state._TP is group


def test_a_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    groups(monkeypatch, 2, 2)
    with pytest.raises(RuntimeError, match="pipeline"), undivided():
        pass
