"""The draft model driven without the host: static buffers, block tables and lengths on the device, CUDA graphs.

Taken from inside vLLM 0.32 beside what `draft_model.py` takes: `AttentionGroup.build_metadata`,
`build_metadata_for_cudagraph_capture`, `update_draft_decode_metadata` and the builders'
`supports_draft_decode_metadata_update` (as `v1/worker/gpu/spec_decode/target_dependent_ar/speculator.py` uses them);
`v1/worker/workspace.py`; `trtllm_workspace_buffer` of `v1/attention/backends/flashinfer.py`; `aux_stream` of
`utils/torch_utils.py`, which `fused_moe/runner/shared_experts.py` may do without. What no GPU has run is listed in
docs/gpu.md.

While the target runs on its own stream these forwards share nothing with it that is written: weights, KV, metadata
builders and their buffers are the draft's own, scratch comes from a lane of its own (`WORKSPACE_LANE`),
FlashInfer's one scratch buffer a process is exchanged for ours while we are at work, and shared experts are computed in
the draft's own stream, not in the one that vLLM has for them in a process (`leave_shared_stream`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import override_forward_context
from vllm.utils import torch_utils
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker import workspace

from vllm_saguaro.drafting.device_model import DecodeRows, Piece
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel
from vllm_saguaro.vllm_hooks.undivided import undivided

WORKSPACE_LANE = 1
"""vLLM's runner works in lane 0."""

_FLASHINFER = "vllm.v1.attention.backends.flashinfer"


class VllmDeviceModel(VllmDraftModel):
    """`DeviceModel` by vLLM, inside a worker with PP = 1, on the worker's device. Not thread-safe."""

    def __init__(self, config: DraftModelConfig) -> None:
        """Load it, with its KV. ValueError where its attention needs the host to know how long the texts are."""
        add_workspace_lane()
        super().__init__(config)
        self.dtype: torch.dtype = self.vllm_config.model_config.dtype
        unfit = {g.backend.get_name() for g in self._attn_groups if not g.supports_draft_decode_metadata_update}
        if unfit and not self._is_cpu:
            fit = '"TRITON_MLA"' if self.vllm_config.model_config.use_mla else '"FLASH_ATTN" or "TRITON_ATTN"'
            raise ValueError(
                f"the draft's attention backend {', '.join(sorted(unfit))} cannot be driven from the device: write "
                f'"attention_backend": {fit} in the speculative config'
            )
        weights = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        self.resident_bytes = sum(weights.values()) + sum(pages.nbytes for pages in self._pages)
        mode = self.vllm_config.compilation_config.cudagraph_mode
        self.captures: bool = not self._is_cpu and mode.has_full_cudagraphs()
        self._starts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._prepared: dict[int, dict[str, Any]] = {}
        self._flashinfer_scratch: Tensor | None = None
        leave_shared_stream(self.model)

    @property
    def pages(self) -> Sequence[Tensor]:
        """The KV by blocks: int8 tensors [layers, num_blocks, bytes]."""
        return self._pages

    @torch.inference_mode()
    def decode(self, rows: DecodeRows) -> Tensor:
        """Write the KV of every row's token; hidden states [X, hidden_size] in the model's dtype."""
        metadata = self._prepared.get(id(rows))
        with self._apart():
            if metadata is None:
                metadata = self._by_layer(self._common(rows), for_capture=False)
            else:
                for group in self._attn_groups:
                    group.update_draft_decode_metadata(metadata)
            return self._run(rows.input_ids, rows.positions, rows.slot_mapping, metadata)

    @torch.inference_mode()
    def read(self, piece: Piece) -> None:
        """Write the KV of the tokens of a piece."""
        device, count = self.device, piece.token_ids.shape[0]
        end = piece.start + count
        common = CommonAttentionMetadata(
            query_start_loc=torch.arange(2, dtype=torch.int32, device=device) * count,
            query_start_loc_cpu=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.full((1,), end, dtype=torch.int32, device=device),
            seq_lens_cpu_upper_bound=torch.tensor([end], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=end,
            block_table_tensor=piece.table.unsqueeze(0),
            slot_mapping=piece.slot_mapping,
            positions=torch.arange(piece.start, end, device=device),
        )
        with self._apart():
            metadata = self._by_layer(common, for_capture=False)
            self._run(piece.token_ids, common.positions, piece.slot_mapping, metadata)

    def prepare(self, rows: DecodeRows) -> None:
        """Metadata over these buffers, whose contents later forwards bring up to date by kernels alone.

        From now on `decode` of these rows is for a capture, or the warm-up before it.
        """
        with self._apart():
            self._prepared[id(rows)] = self._by_layer(self._common(rows), for_capture=True)

    def close(self) -> None:
        """Give back weights and KV. The end of the model."""
        self._prepared.clear()
        self._starts.clear()
        self._flashinfer_scratch = None
        super().close()

    def _common(self, rows: DecodeRows) -> CommonAttentionMetadata:
        """One token a row. The host knows no length, so it says the greatest."""
        count = rows.input_ids.shape[0]
        if count not in self._starts:
            on_host = torch.arange(count + 1, dtype=torch.int32)
            self._starts[count] = (
                torch.arange(count + 1, dtype=torch.int32, device=self.device),
                on_host,
                torch.full((count,), self.max_length, dtype=torch.int32),
            )
        start, start_on_host, longest = self._starts[count]
        return CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start_on_host,
            seq_lens=rows.lengths,
            seq_lens_cpu_upper_bound=longest,
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=self.max_length,
            block_table_tensor=rows.tables,
            slot_mapping=rows.slot_mapping,
            positions=rows.positions,
        )

    def _by_layer(self, common: CommonAttentionMetadata, for_capture: bool) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for group in self._attn_groups:
            build = group.build_metadata_for_cudagraph_capture if for_capture else group.build_metadata
            metadata |= dict.fromkeys(group.layer_names, build(common))
        return metadata

    def _run(self, token_ids: Tensor, positions: Tensor, slots: Tensor, metadata: dict[str, Any]) -> Tensor:
        self._context.attn_metadata = metadata
        self._context.slot_mapping = dict.fromkeys(metadata, slots)
        with override_forward_context(self._context), undivided():
            return self.model(input_ids=token_ids, positions=positions)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Whatever vLLM keeps as scratch for the whole process is another while inside.

        Builders reserve the most that they will need in it (TRITON_MLA), so they are made inside, too.
        """
        lane = WORKSPACE_LANE if workspace.is_workspace_manager_initialized() else 0
        with workspace.use_workspace_lane(lane), self._own_flashinfer_scratch():
            yield

    @contextlib.contextmanager
    def _own_flashinfer_scratch(self) -> Iterator[None]:
        flashinfer: Any = sys.modules.get(_FLASHINFER)
        if flashinfer is None or not any(g.backend.get_name() == "FLASHINFER" for g in self._attn_groups):
            yield
            return
        target = flashinfer.trtllm_workspace_buffer
        flashinfer.trtllm_workspace_buffer = self._flashinfer_scratch
        try:
            yield
        finally:
            self._flashinfer_scratch = flashinfer.trtllm_workspace_buffer
            flashinfer.trtllm_workspace_buffer = target


def leave_shared_stream(model: torch.nn.Module) -> None:
    """Have a draft's shared experts run in its own stream, not in the one that vLLM has for all models of a process.

    That is sound for one model alone: its memory is given back on the host when the host has enqueued what reads it,
    and the next work of that stream waits for the model that asks, so not for what the other one has yet to read.
    """
    shared = torch_utils.aux_stream()
    if shared is None:
        return
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is shared:
                setattr(module, name, None)


def add_workspace_lane() -> None:
    """Give vLLM's scratch a second lane, if it has but one (it makes two for DSpark alone). What is in use stays."""
    if not workspace.is_workspace_manager_initialized():
        return
    manager = workspace.current_workspace_manager()
    lanes, wanted = manager._num_lanes, WORKSPACE_LANE + 1
    if lanes >= wanted:
        return
    scratch, kept = [], []
    for first in range(0, len(manager._current_workspaces), lanes):
        scratch += [*manager._current_workspaces[first : first + lanes], *[None] * (wanted - lanes)]
        kept += [*manager._persistent_resources[first : first + lanes], *({} for _ in range(wanted - lanes))]
    manager._current_workspaces, manager._persistent_resources, manager._num_lanes = scratch, kept, wanted
