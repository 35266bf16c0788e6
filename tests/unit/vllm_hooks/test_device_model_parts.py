"""What the draft model on a GPU does with vLLM's attention: which it refuses, metadata inside a graph, scratch.

Against stand-ins for attention groups, model and FlashInfer's module.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner import shared_experts
from vllm.utils import torch_utils
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker import workspace

from vllm_saguaro.drafting.device_model import DecodeRows, Piece
from vllm_saguaro.vllm_hooks import device_draft_model, draft_model
from vllm_saguaro.vllm_hooks.device_draft_model import WORKSPACE_LANE, VllmDeviceModel, leave_shared_stream
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel

CONFIG = DraftModelConfig(model="draft", max_length=64, max_rows=4, kv_cache_bytes=0)


class Metadata:
    """Of one group: over which buffers, for a graph or not, made in which lane, and how often brought up to date."""

    def __init__(self, common: CommonAttentionMetadata, for_capture: bool) -> None:
        self.common, self.for_capture, self.updates = common, for_capture, 0
        self.lane = workspace._workspace_lane.get()


class Group:
    """An attention group of some layers."""

    def __init__(self, *layer_names: str, backend: str = "FLASH_ATTN", updates: bool = True) -> None:
        self.layer_names = list(layer_names)
        self.supports_draft_decode_metadata_update = updates
        self.backend = SimpleNamespace(get_name=lambda: backend)

    def build_metadata(self, common: CommonAttentionMetadata) -> Metadata:
        return Metadata(common, False)

    def build_metadata_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Metadata:
        return Metadata(common, True)

    def update_draft_decode_metadata(self, metadata: dict[str, Metadata]) -> None:
        metadata[self.layer_names[0]].updates += 1


class Network(torch.nn.Module):
    """Notes what its attention layers would find, each with the lane of vLLM's scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.found: list[tuple[dict[str, Metadata], dict[str, Tensor], int]] = []
        self.during: Any = lambda: None

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        context = get_forward_context()
        self.found.append((context.attn_metadata, context.slot_mapping, workspace._workspace_lane.get()))
        self.during()
        return torch.zeros(input_ids.shape[0], 8)


def make(groups: Sequence[Group], *, on_cpu: bool = False, mla: bool = False) -> VllmDeviceModel:
    def load(self: Any, config: DraftModelConfig) -> None:
        self.device, self._is_cpu, self.max_length = torch.device("cpu"), on_cpu, config.max_length
        self.model, self._attn_groups, self._pages = Network(), list(groups), [torch.zeros(2, 3, 4)]
        self._context = SimpleNamespace()
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32, use_mla=mla),
            compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY),
        )

    with mock.patch.object(VllmDraftModel, "__init__", load):
        return VllmDeviceModel(CONFIG)


# ---- which attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mla", "fit"), [(False, '"FLASH_ATTN" or "TRITON_ATTN"'), (True, '"TRITON_MLA"')])
def test_attention_that_asks_the_host_for_lengths_is_refused_in_one_line(mla: bool, fit: str) -> None:
    groups = [Group("a"), Group("b", backend="FLEX_ATTENTION", updates=False), Group("c", backend="A", updates=False)]
    with pytest.raises(ValueError, match="backend A, FLEX_ATTENTION cannot be driven from the device") as caught:
        make(groups, mla=mla)
    assert str(caught.value).endswith(f'write "attention_backend": {fit} in the speculative config')
    assert "\n" not in str(caught.value)


def test_attention_that_brings_its_metadata_up_to_date_goes_into_graphs() -> None:
    model = make([Group("a"), Group("b", backend="TRITON_ATTN")])
    assert model.captures
    assert model.resident_bytes == 4 * 4 + 2 * 3 * 4 * 4


def test_on_a_cpu_any_attention_will_do_and_nothing_is_captured() -> None:
    assert not make([Group("a", backend="CPU_ATTN", updates=False)], on_cpu=True).captures


# ---- streams --------------------------------------------------------------------------------------------------------


def test_shared_experts_of_a_draft_stay_in_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's one stream for them is sound for one model at a time."""
    shared, own = object(), object()
    monkeypatch.setattr(torch_utils, "aux_stream", lambda: shared)
    experts: Any = torch.nn.Module()
    experts._stream, experts.another = shared, own
    model = torch.nn.Sequential(torch.nn.Module(), experts)
    leave_shared_stream(model)
    assert experts._stream is None
    assert experts.another is own


def test_a_draft_that_is_loaded_has_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[torch.nn.Module] = []
    monkeypatch.setattr(device_draft_model, "leave_shared_stream", left.append)
    model = make([Group("a")])
    assert left == [model.model]


def test_vllms_shared_experts_can_do_without_a_stream() -> None:
    source = inspect.getsource(shared_experts.SharedExperts)
    assert "self._stream = aux_stream()" in source
    assert "and self._stream is not None" in source


# ---- metadata -------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> DecodeRows:
    return DecodeRows.empty(count, 2, torch.device("cpu"))


def test_rows_that_are_prepared_keep_their_metadata_and_have_it_brought_up_to_date() -> None:
    model = make([Group("a", "b"), Group("c", backend="TRITON_ATTN")])
    rows, others = rows_of(4), rows_of(4)
    model.prepare(rows)
    for _ in range(2):
        model.decode(rows)
    (first, slots, _), (second, _, _) = model.model.found
    assert first is second, "a graph holds the metadata that it was captured with"
    assert set(first) == set(slots) == {"a", "b", "c"}
    assert first["a"] is first["b"] is not first["c"]
    assert [first[name].updates for name in "ac"] == [2, 2], "once a forward, inside of what is captured"
    for metadata in first.values():
        assert metadata.for_capture
        common = metadata.common
        assert common.seq_lens is rows.lengths, "what it is brought up to date from are the buffers themselves"
        assert common.block_table_tensor is rows.tables
        assert common.slot_mapping is rows.slot_mapping is slots["a"]
        assert (common.num_reqs, common.max_query_len, common.max_seq_len) == (4, 1, 64)
        assert common.seq_lens_cpu_upper_bound.tolist() == [64] * 4, "the host knows no length"
        assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist() == [0, 1, 2, 3, 4]
    model.decode(others)
    found = model.model.found[-1][0]
    assert not found["a"].for_capture, "rows of the same shape in other buffers are others"
    assert found["a"].common.seq_lens is others.lengths


def test_what_is_prepared_again_is_made_anew() -> None:
    """Before the warm-up and before the capture: the one may have left its marks in the metadata."""
    model, rows = make([Group("a")]), rows_of(2)
    for _ in range(2):
        model.prepare(rows)
        model.decode(rows)
    (first, _, _), (second, _, _) = model.model.found
    assert first["a"] is not second["a"]
    assert [first["a"].updates, second["a"].updates] == [1, 1]


def test_a_piece_of_a_prompt_has_metadata_of_its_own() -> None:
    model, rows = make([Group("a")]), rows_of(1)
    model.prepare(rows)
    slots = torch.arange(3) + 4
    model.read(Piece(torch.tensor([5, 6, 7]), 4, torch.tensor([1, 2], dtype=torch.int32), slots))
    metadata = model.model.found[-1][0]["a"]
    assert (metadata.for_capture, metadata.updates) == (False, 0)
    common = metadata.common
    assert (common.num_reqs, common.max_query_len, common.max_seq_len) == (1, 3, 7)
    assert common.seq_lens.tolist() == common.seq_lens_cpu_upper_bound.tolist() == [7]
    assert common.positions.tolist() == [4, 5, 6]


# ---- scratch --------------------------------------------------------------------------------------------------------


def test_forwards_and_metadata_are_in_a_lane_of_their_own() -> None:
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    with mock.patch.object(workspace, "_manager", manager), mock.patch.object(torch.accelerator, "empty_cache"):
        model, rows = make([Group("a")]), rows_of(1)
        model.prepare(rows)
        model.decode(rows)
        metadata, _, lane = model.model.found[-1]
        assert [metadata["a"].lane, lane] == [WORKSPACE_LANE] * 2
        assert workspace._workspace_lane.get() == 0
        assert manager._num_lanes == WORKSPACE_LANE + 1


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmDeviceModel, list[tuple[str, int]]]]:
    """A model that is really made, of stand-ins for vLLM's parts; what was done, each with the lane of scratch."""
    done: list[tuple[str, int]] = []
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16),
        compilation_config=SimpleNamespace(
            static_forward_context={}, cudagraph_mode=CUDAGraphMode.NONE, ir_enable_torch_wrap=False
        ),
        model_config=SimpleNamespace(
            dtype=torch.float32, use_mla=False, get_vocab_size=lambda: 40, get_hidden_size=lambda: 8
        ),
    )

    def noted(what: str, result: Any = None) -> Any:
        done.append((what, workspace._workspace_lane.get()))
        return result

    def wants_64(config: Any) -> None:
        noted("block size")
        config.cache_config.block_size = 64

    def backend(kv_config: Any, config: Any, device: Any) -> Any:
        assert kv_config.block_size == 64
        return noted("builders", ([[Group("a")]], None, [kv_config.block_size]))

    def plan(config: Any, _: Any) -> Any:
        return noted("KV", SimpleNamespace(num_blocks=3, block_size=config.cache_config.block_size))

    for name, stand_in in {
        "_engine_config": lambda config: vllm_config,
        "set_current_vllm_config": lambda config: contextlib.nullcontext(),
        "get_model": lambda vllm_config: noted("weights", Network()),
        "current_platform": SimpleNamespace(update_block_size_for_backend=wants_64),
        "_plan_kv_cache": plan,
        "init_attn_backend": backend,
        "init_kv_cache": lambda *told: {},
        "_pages": lambda *told: [torch.zeros(2, 3, 4)],
        "create_forward_context": lambda *told: SimpleNamespace(),
    }.items():
        monkeypatch.setattr(draft_model, name, stand_in)
    monkeypatch.setattr(draft_model.parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(VllmDraftModel, "_prepare_process", lambda self: None)
    monkeypatch.setattr(VllmDraftModel, "_forward", lambda self, batch: noted(f"forward of {len(batch.lengths)}"))
    monkeypatch.setattr(VllmDraftModel, "logits", lambda self, hidden: None)
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    with mock.patch.object(workspace, "_manager", manager):
        yield VllmDeviceModel(CONFIG), done


def test_what_attention_reserves_and_a_first_forward_takes_is_in_the_drafts_lane(
    loaded: tuple[VllmDeviceModel, list[tuple[str, int]]],
) -> None:
    """TRITON_MLA's builder reserves the most that it will need: elsewhere the draft's lane would grow later."""
    model, done = loaded
    assert ("builders", WORKSPACE_LANE) in done
    done.clear()
    model.warm_up(rows=(4,))
    assert done == [(f"forward of {count}", WORKSPACE_LANE) for count in (1, 4, 2, 1)]
    assert workspace._workspace_lane.get() == 0


def test_blocks_are_of_the_size_that_the_attention_wants(
    loaded: tuple[VllmDeviceModel, list[tuple[str, int]]],
) -> None:
    model, done = loaded
    assert [what for what, _ in done] == ["weights", "block size", "KV", "builders"]
    assert model.block_size == 64


def test_blocks_that_the_attention_divides_are_refused_in_one_line(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_model, "init_attn_backend", lambda *told: ([[Group("a")]], None, [32]))
    with pytest.raises(ValueError, match=r"draft cannot draft: its attention has blocks of \[32\] .* blocks of 64"):
        VllmDeviceModel(CONFIG)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module of that backend, with the target's scratch in it."""
    module = SimpleNamespace(trtllm_workspace_buffer="the target's")
    monkeypatch.setitem(sys.modules, device_draft_model._FLASHINFER, module)
    return module


def test_flashinfers_scratch_is_another_one_for_the_draft_and_the_same_each_time(flashinfer: Any) -> None:
    model, rows = make([Group("a"), Group("b", backend="FLASHINFER")]), rows_of(1)
    found = []

    def as_flashinfer_does() -> None:
        found.append(flashinfer.trtllm_workspace_buffer)
        if flashinfer.trtllm_workspace_buffer is None:
            flashinfer.trtllm_workspace_buffer = "the draft's"

    model.model.during = as_flashinfer_does
    for _ in range(3):
        model.decode(rows)
        assert flashinfer.trtllm_workspace_buffer == "the target's"
    assert found == [None, "the draft's", "the draft's"]


def test_an_error_inside_leaves_the_target_its_scratch(flashinfer: Any) -> None:
    model = make([Group("b", backend="FLASHINFER")])
    model.model.during = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.decode(rows_of(1))
    assert flashinfer.trtllm_workspace_buffer == "the target's"


def test_a_target_without_scratch_yet_gets_one_of_its_own(flashinfer: Any) -> None:
    flashinfer.trtllm_workspace_buffer = None
    model = make([Group("b", backend="FLASHINFER")])

    def allocate() -> None:
        flashinfer.trtllm_workspace_buffer = "the draft's"

    model.model.during = allocate
    model.decode(rows_of(1))
    assert flashinfer.trtllm_workspace_buffer is None


def test_other_attention_than_flashinfers_exchanges_nothing(flashinfer: Any) -> None:
    model, found = make([Group("a")]), []
    model.model.during = lambda: found.append(flashinfer.trtllm_workspace_buffer)
    model.decode(rows_of(1))
    assert found == ["the target's"]


def test_vllms_module_has_the_scratch_where_it_is_exchanged() -> None:
    """By its source: importing it wants FlashInfer, and a GPU to run."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec(device_draft_model._FLASHINFER)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert "\ntrtllm_workspace_buffer = None\n" in source
    assert "global trtllm_workspace_buffer\n" in source
