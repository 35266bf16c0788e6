"""The draft model on vLLM's own parts: loader, attention backend and paged KV, without its scheduler and its runner.

Taken from inside vLLM 0.32 (0.33 was read, not run: the same, except where said): `get_model`; `get_kv_cache_spec`,
`init_attn_backend`, `init_kv_cache`; `get_kv_cache_configs`, which 0.33 moved; `get_supported_kv_cache_layouts`,
`resolve_kv_cache_layout`; `CommonAttentionMetadata`; `create_forward_context`, `override_forward_context`;
`init_worker_distributed_environment`; `update_block_size_for_backend` (of 0.33 not read);
`_set_torch_accelerator_to_noop`; the switches of `vllm.ir`.

The model is made under a VllmConfig of its own. One derived from the target's (`vllm.config.utils.replace`) would share
its `compilation_config`, and the draft's layers would become KV layers of the target.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import vllm.ir
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_saguaro.algorithm.noise import gumbel_of_all
from vllm_saguaro.drafting.model import Batch
from vllm_saguaro.vllm_hooks.undivided import undivided

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_configs  # 0.33
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs  # 0.32

logger = init_logger(f"vllm.{__name__}")  # below "vllm": only there has vLLM's logging a handler


@dataclass(frozen=True, slots=True)
class DraftModelConfig:
    """How the draft is loaded and how large it may grow; plain values only, so that it travels as JSON.

    Lengths count tokens, `max_rows` the branches of all requests together. `kv_cache_bytes` is raised to what one text
    needs; `kv_cache_tokens`, where it is not 0, is the tokens that the KV is wanted for, as far as the bytes go.
    `vocab_size` is the target's: families pad it differently, and every draft must be a token of the target.
    `graph_rows`: rows of the forwards that will be captured as CUDA graphs. `compilation_mode`: vLLM's, as written for
    the target; None: vLLM's default.
    """

    model: str
    max_length: int
    max_rows: int
    kv_cache_bytes: int
    kv_cache_tokens: int = 0
    max_tokens: int = 2048
    graph_rows: Sequence[int] = ()
    vocab_size: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    enforce_eager: bool = False
    compilation_mode: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
    code_revision: str | None = None
    quantization: str | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str = "auto"
    moe_backend: str | None = None
    config_format: str = "auto"
    load_format: str = "auto"
    download_dir: str | None = None


class VllmDraftModel:
    """`DraftModel` by vLLM, in a process of its own or inside a vLLM worker (with PP = 1). Not thread-safe."""

    def __init__(self, config: DraftModelConfig) -> None:
        self.device = torch.device(config.device)
        self._is_cpu = self.device.type == "cpu"
        self._owns_process = not parallel_state.model_parallel_is_initialized()
        # In a worker the environment speaks of the target (LOCAL_WORLD_SIZE, LD_PRELOAD): it is left as it was.
        with _environment(kept=not self._owns_process):
            self.vllm_config = _engine_config(config)
        self._prepare_process()
        self._attn_groups: list[AttentionGroup] = []
        with set_current_vllm_config(self.vllm_config), undivided(), self._apart():
            with set_model_tag("saguaro_draft"):
                self.model = get_model(vllm_config=self.vllm_config)
            current_platform.update_block_size_for_backend(self.vllm_config)  # as vLLM's executors do at this point
            kv_config = _plan_kv_cache(self.vllm_config, config)
            attn_groups, _, kernel_block_sizes = init_attn_backend(kv_config, self.vllm_config, self.device)
            layers = self.vllm_config.compilation_config.static_forward_context
            kv_caches = init_kv_cache(layers, kv_config, self.device, kernel_block_sizes, self.vllm_config)

        model_config = self.vllm_config.model_config
        self.vocab_size = min(model_config.get_vocab_size(), config.vocab_size or model_config.get_vocab_size())
        self.hidden_size = model_config.get_hidden_size()
        self.block_size, self.num_blocks = self.vllm_config.cache_config.block_size, kv_config.num_blocks
        self.max_length, self.max_tokens, self.max_rows = config.max_length, config.max_tokens, config.max_rows
        if kernel_block_sizes != [self.block_size]:
            raise ValueError(
                f"{config.model} cannot draft: its attention has blocks of {kernel_block_sizes} tokens in KV blocks of "
                f"{self.block_size}."
            )
        self._attn_groups, self._pages = attn_groups[0], _pages(kv_config, kv_caches)
        self._context = create_forward_context(None, self.vllm_config)
        self._is_warm = False
        logger.info("Draft model %s (%s): %d KV blocks.", config.model, model_config.dtype, self.num_blocks)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write the KV of every token of `batch`; return hidden states [T, hidden_size] in the model's dtype."""
        if not self._is_warm:  # a first forward of one token would corrupt the heap
            self.warm_up()
        return self._forward(batch)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab_size] float32 of hidden states [R, hidden_size]."""
        with undivided():
            return self.model.compute_logits(hidden)[:, : self.vocab_size].float()

    @torch.inference_mode()
    def greedy(self, hidden: torch.Tensor) -> np.ndarray:
        """The likeliest token [R] int64, on the host, after each of the hidden states [R, hidden_size]."""
        if self.device.type == "cpu":
            return self.logits(hidden).numpy().argmax(axis=-1)  # torch's argmax is scalar here, 10 to 60 times slower
        return self.logits(hidden).argmax(dim=-1).cpu().numpy()

    @torch.inference_mode()
    def race(self, logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """argmax_t logits_t + g_t [R] int64 of logits [R, V] float32, with vLLM's own noise for seeds [R]."""
        if self._is_cpu:  # `TopKTopPSampler.forward_cpu` draws with it; it looks at few tokens more than the likeliest
            return torch.ops._C.fused_gumbel_argmax(logits, seeds)
        return (logits.double() + gumbel_of_all(seeds, logits.shape[-1])).argmax(-1)

    @torch.inference_mode()
    def copy_blocks(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of whole blocks in every layer, source[i] to destination[i]; the two are disjoint."""
        if self._is_cpu:
            # One strided copy a block, all layers at once: 2 to 8 times faster here than index_select and index_copy_.
            for src, dst in zip(source, destination, strict=True):
                for pages in self._pages:
                    pages[:, dst].copy_(pages[:, src])
            return
        src_ids, dst_ids = (torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in (source, destination))
        for pages in self._pages:
            pages.index_copy_(1, dst_ids, pages.index_select(1, src_ids))  # the gather clones: no view of itself

    def warm_up(self, rows: Iterable[int] = ()) -> None:
        """Compile, and run the row counts `rows` once each. Only before any KV is held: it overwrites the first blocks.

        The very first forward has many tokens: a graph compiled with one token is specialised to it, and as vLLM drops
        the guards, every other size then corrupts the heap.
        """
        self._is_warm = True
        length = max(2, min(self.max_length, self.max_tokens, 2 * self.block_size))
        row_counts = sorted({min(count, self.max_rows, self.max_tokens) for count in (1, 2, *rows)}, reverse=True)
        with (
            torch.inference_mode(),
            _environment(kept=not self._owns_process),
            set_current_vllm_config(self.vllm_config),
            self._apart(),
            vllm.ir.enable_torch_wrap(self.vllm_config.compilation_config.ir_enable_torch_wrap),
            # Inductor's compile workers are processes: forbidden in a daemonic one, and not worth it for one graph.
            torch._inductor.config.patch(compile_threads=1),
        ):
            for query_lengths in ([length], *([1] * count for count in row_counts)):
                self.logits(self._forward(_fresh_batch(query_lengths, self.block_size)))

    def close(self) -> None:
        """Give back weights and KV and, in a process of its own, vLLM's process groups. The end of the model."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            layer.kv_cache = torch.tensor([])
        self.vllm_config.compilation_config.static_forward_context.clear()
        self._pages, self._attn_groups, self.model = [], [], None
        gc.collect()  # modules and their configuration refer to each other
        if self._owns_process and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()

    def _apart(self) -> AbstractContextManager[None]:
        """Where scratch that vLLM keeps for the whole process may be asked for. Here nobody else needs it."""
        return contextlib.nullcontext()

    def _prepare_process(self) -> None:
        """What a vLLM worker does before it loads a model."""
        if self._is_cpu:
            from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

            _set_torch_accelerator_to_noop()  # get_model empties the accelerator's cache, which raises without one
            if torch.cpu._is_amx_tile_supported():
                torch.cpu._init_amx()  # else a first forward of one row uses AMX before it is permitted: SIGILL
        if not self._owns_process:
            return
        # Else RMSNorm is an opaque operator in the compiled graph and runs as eight eager ones: a third of a step.
        vllm.ir.set_default_torch_wrap(self.vllm_config.compilation_config.ir_enable_torch_wrap)
        self.vllm_config.kernel_config.ir_op_priority.set_default()
        if self._is_cpu:
            cores = len(os.sched_getaffinity(0))
            if torch.get_num_threads() > cores:
                torch.set_num_threads(cores)  # torch counts cores when imported, the affinity may be set after that
        else:
            torch.accelerator.set_device_index(self.device)
            init_workspace_manager(self.device, 1)

        # A file as meeting point: a port could be taken by another engine between choice and use.
        with tempfile.TemporaryDirectory(prefix="saguaro_") as folder, set_current_vllm_config(self.vllm_config):
            place = (f"file://{folder}/rendezvous", self.device.index or 0, current_platform.dist_backend)
            init_worker_distributed_environment(self.vllm_config, 0, *place)

    def _forward(self, batch: Batch) -> torch.Tensor:
        arrays = (batch.query_start, batch.lengths, batch.blocks, batch.positions, batch.token_ids)
        on_host = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        # On the CPU the tensors are the arrays' own memory, and even a `to` that does nothing costs microseconds.
        on_device = on_host if self._is_cpu else [tensor.to(self.device) for tensor in on_host]
        query_start, lengths, blocks, positions, token_ids = on_device
        if self._is_cpu:  # the same as slots_of in one operator instead of six: 20 us
            slots = torch.empty_like(positions)
            torch.ops._C.compute_slot_mapping_kernel_impl(query_start, positions, blocks, slots, self.block_size)
        else:
            slots = torch.from_numpy(slots_of(batch, self.block_size)).to(self.device)
        common = CommonAttentionMetadata(
            query_start_loc=query_start,
            query_start_loc_cpu=on_host[0],
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=on_host[1],
            num_reqs=batch.lengths.size,
            num_actual_tokens=batch.token_ids.size,
            max_query_len=int(np.diff(batch.query_start).max()),
            max_seq_len=int(batch.lengths.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
            positions=positions,
        )
        built = [(group.build_metadata(common), group.layer_names) for group in self._attn_groups]
        self._context.attn_metadata = {name: metadata for metadata, names in built for name in names}
        self._context.slot_mapping = dict.fromkeys(self._context.attn_metadata, slots)
        with override_forward_context(self._context), undivided():
            return self.model(input_ids=token_ids, positions=positions)


def slots_of(batch: Batch, block_size: int) -> np.ndarray:
    """Place of every token's KV in the whole cache, [T] int64: block id * block_size + offset."""
    rows = np.repeat(np.arange(batch.lengths.shape[0]), np.diff(batch.query_start))
    return batch.blocks[rows, batch.positions // block_size] * np.int64(block_size) + batch.positions % block_size


@contextlib.contextmanager
def _environment(kept: bool) -> Iterator[None]:
    """If `kept`, undo what is done to the environment variables inside."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys() if kept else ():
            del os.environ[name]
        os.environ.update(before if kept else {})


_SAME_IN_ENGINE_ARGS = (
    *("model", "dtype", "seed", "trust_remote_code", "revision", "code_revision", "quantization", "enforce_eager"),
    *("kv_cache_dtype", "config_format", "load_format", "download_dir"),
)


def _engine_config(config: DraftModelConfig) -> VllmConfig:
    vllm_config = EngineArgs(
        **{name: getattr(config, name) for name in _SAME_IN_ENGINE_ARGS},
        **({"moe_backend": config.moe_backend} if config.moe_backend else {}),
        attention_backend=AttentionBackendEnum[config.attention_backend] if config.attention_backend else None,
        max_model_len=config.max_length,
        max_num_seqs=config.max_rows,
        max_num_batched_tokens=max(config.max_tokens, config.max_rows),
        block_size=32 if config.device == "cpu" else None,  # CPU_ATTN takes multiples of 32 alone (AMX layout)
        compilation_config=_compilation_config(config),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        # Sliding-window layers then keep their whole past like the others: one KV group, one block table a row.
        disable_hybrid_kv_cache_manager=True,
    ).create_engine_config()
    if vllm_config.model_config.uses_mrope:
        raise ValueError(f"{config.model} cannot draft: its rotary positions have several dimensions.")
    return vllm_config


def _compilation_config(config: DraftModelConfig) -> dict[str, Any]:
    """The target's mode, as vLLM's own `draft_model` has it, unless the draft is eager: vLLM then knows what to do."""
    mode = {} if config.enforce_eager or config.compilation_mode is None else {"mode": config.compilation_mode}
    return mode | (_graph_config(config) if config.graph_rows and config.device != "cpu" else {})


def _graph_config(config: DraftModelConfig) -> dict[str, Any]:
    """Whole forwards are captured, and not by vLLM: its wrappers around pieces of a model would capture those again.

    The backends size what they keep for graphs by the capture sizes, and choose kernels by them.
    """
    if config.enforce_eager:
        return {}
    return {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(set(config.graph_rows))}


def _plan_kv_cache(vllm_config: VllmConfig, config: DraftModelConfig) -> KVCacheConfig:
    """One pool of blocks within the budget, at least enough for one text of the greatest length."""
    specs = get_kv_cache_spec(vllm_config)
    if not specs or not all(isinstance(spec, AttentionSpec) for spec in specs.values()):
        raise ValueError(f"{config.model} cannot draft: all of its state must be attention KV, not {specs}.")
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))]
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())  # EngineCore's task, and there is none here
    # vLLM refuses a budget below one text of max_model_len and the null block that its scheduler would hold back.
    blocks = -(-config.max_length // vllm_config.cache_config.block_size) + 1
    least = blocks * sum(spec.page_size_bytes for spec in specs.values())
    if least > config.kv_cache_bytes:
        logger.warning("Draft KV cache: %d bytes raised to %d, one text's worth.", config.kv_cache_bytes, least)
    budget = config.kv_cache_bytes
    if config.kv_cache_tokens:
        wanted = -(-config.kv_cache_tokens // vllm_config.cache_config.block_size) + 1
        budget = min(budget, wanted * sum(spec.page_size_bytes for spec in specs.values()))
    kv_config = get_kv_cache_configs(vllm_config, [specs], [max(least, budget)])[0]
    if (count := len(kv_config.kv_cache_groups)) != 1:
        raise ValueError(f"{config.model} cannot draft: a branch has one block table, the model {count} KV groups.")
    vllm_config.cache_config.num_gpu_blocks = kv_config.num_blocks
    return kv_config


def _pages(kv_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Views int8 [layers, num_blocks, bytes] of the allocation, whichever of layer and block is outermost in it."""
    views = []
    for tensor in kv_config.kv_cache_tensors:
        cache = kv_caches[tensor.layers[0]]
        shape = (len(tensor.layers), kv_config.num_blocks, cache[0].numel() * cache.element_size())
        raw = torch.empty(0, dtype=torch.int8, device=cache.device).set_(cache.untyped_storage())
        views.append(raw.as_strided(shape, (tensor.layer_stride, tensor.block_stride, 1), tensor.offset))
    return views


def _fresh_batch(query_lengths: list[int], block_size: int) -> Batch:
    """Rows that feed their first tokens, all into the same first blocks."""
    first_blocks = np.arange(-(-max(query_lengths) // block_size), dtype=np.int32)
    return Batch(
        token_ids=np.zeros(sum(query_lengths), np.int64),
        positions=np.concatenate([np.arange(length) for length in query_lengths]),
        query_start=np.cumsum([0, *query_lengths], dtype=np.int32),
        lengths=np.array(query_lengths, np.int32),
        blocks=np.tile(first_blocks, (len(query_lengths), 1)),
    )
