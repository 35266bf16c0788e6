"""A draft inside a rank: what vLLM's layers find as their tensor-parallel group, alone and in real ranks with gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state

from tests.unit.vllm_hooks.rank_processes import answers_of_ranks
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


TOKENS = [3, 60, 0]


def _layers() -> tuple[list[Any], list[tuple[int, ...]]]:
    """An embedding and projections as a model has them, with weights that are the same everywhere; their shapes."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    random = torch.Generator().manual_seed(0)
    up, down = ColumnParallelLinear(8, 16, bias=False), RowParallelLinear(16, 8, bias=False)
    layers: list[Any] = [VocabParallelEmbedding(64, 8), up, down]
    shapes = []
    for layer in layers:
        shapes.append(tuple(layer.weight.shape))
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=random))
        layer.quant_method.process_weights_after_loading(layer)  # may pack them
    return layers, shapes


def _rank(rank: int, meeting: str, answers: Any) -> None:
    """The first rank runs layers of a draft, the other none: where they were divided the first would wait for ever."""
    from vllm.config import VllmConfig, set_current_vllm_config

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        parallel_state.init_distributed_environment(2, rank, f"file://{meeting}", rank, "gloo")
        parallel_state.initialize_model_parallel(2)
        shapes, output = list[tuple[int, ...]](), None
        if rank == 0:
            with undivided():
                (embedding, up, down), shapes = _layers()
                output = down(up(embedding(torch.tensor(TOKENS)))[0])[0].tolist()
        total = parallel_state.get_tp_group().all_reduce(torch.full((3,), rank + 1.0)).tolist()
    answers.put((rank, shapes, output, total))


def test_layers_of_a_draft_are_whole_in_a_divided_target(tmp_path: Path) -> None:
    found = {rank: rest for rank, *rest in answers_of_ranks(2, _rank, tmp_path, 240)}
    random = torch.Generator().manual_seed(0)
    table, up, down = (torch.randn(shape, generator=random) for shape in ((64, 8), (16, 8), (8, 16)))
    expected = table[TOKENS] @ up.T @ down.T
    shapes, output, total = found[0]
    assert shapes == [(64, 8), (16, 8), (8, 16)]
    torch.testing.assert_close(torch.tensor(output), expected)
    assert total == found[1][-1] == [3.0] * 3, "afterwards the target's ranks are together again"
