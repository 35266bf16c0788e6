"""What the stream placement asks of the draft model, and the second lane of vLLM's scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_saguaro.drafting.buckets import branches_for


def test_the_default_has_room_for_a_usual_text_in_every_slot_and_its_branches() -> None:
    from vllm_saguaro.vllm_hooks.stream_draft import USUAL_LENGTH, default_kv_tokens

    tokens = default_kv_tokens(64, 20, 100_000, 4)
    assert tokens >= 64 * (USUAL_LENGTH + branches_for(64, 20) * 2 * 32)
    assert default_kv_tokens(1, 20, 100_000, 4) > 100_000
    assert default_kv_tokens(64, 20, 512, 4) < 64 * (1024 + 4 * 64)


@pytest.mark.parametrize(("given", "expected"), [(0, (1 << 30, True)), (5 << 20, (5 << 20, False))])
def test_bytes_that_are_given_are_taken_and_a_default_is_bounded(given: int, expected: tuple[int, bool]) -> None:
    from vllm_saguaro.drafting.buckets import buckets
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig
    from vllm_saguaro.vllm_hooks.stream_draft import StreamOptions, _model_config

    config = DraftModelConfig(model="draft", max_length=512, max_rows=1, kv_cache_bytes=given)
    options = StreamOptions(config, slots=8, num_speculative_tokens=4)
    found = _model_config(options, 20, buckets(8, 20))
    assert (found.kv_cache_bytes, found.kv_cache_tokens > 0) == expected
    assert found.max_rows == 160
    assert found.graph_rows == [1, 2, 4, 8, 20, 40, 80, 160]


def test_graphs_are_configured_by_the_rows_that_are_captured() -> None:
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, _graph_config

    config = DraftModelConfig(model="draft", max_length=512, max_rows=8, kv_cache_bytes=0, graph_rows=[8, 2, 8])
    assert _graph_config(config) == {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [2, 8]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"compilation_mode": 0}, {"mode": 0}),
        ({"compilation_mode": 3, "enforce_eager": True}, {}),
        (
            {"compilation_mode": 0, "device": "cuda:0", "graph_rows": [4]},
            {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4]},
        ),
    ],
)
def test_the_draft_is_compiled_as_it_is_told(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, _compilation_config

    config = DraftModelConfig(model="draft", max_length=512, max_rows=8, kv_cache_bytes=0, **changes)
    assert _compilation_config(config) == expected


def test_a_second_lane_is_added_and_what_is_in_use_stays() -> None:
    from unittest import mock

    from vllm.v1.worker import workspace

    from vllm_saguaro.vllm_hooks.device_draft_model import add_workspace_lane

    manager = workspace.WorkspaceManager(torch.device("cpu"), num_ubatches=2)
    with (
        mock.patch.object(workspace, "_manager", manager),
        mock.patch.object(torch.accelerator, "empty_cache"),
    ):
        (scratch,) = manager.get_simultaneous(((8,), torch.uint8))
        manager.get_persistent_resource("kept", lambda: 1)
        for _ in range(2):
            add_workspace_lane()
        (again,) = manager.get_simultaneous(((8,), torch.uint8))
        assert again.data_ptr() == scratch.data_ptr()
        assert manager.get_persistent_resource("kept", lambda: 2) == 1
        with workspace.use_workspace_lane(1):
            (other,) = manager.get_simultaneous(((8,), torch.uint8))
            assert other.data_ptr() != scratch.data_ptr()
            assert manager.get_persistent_resource("kept", lambda: 2) == 2
        assert len(manager._current_workspaces) == len(manager._persistent_resources) == 4
