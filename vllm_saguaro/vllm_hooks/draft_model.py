"""The draft model on vLLM's own parts: loader, attention backend and paged KV, without its scheduler and its runner.

What is taken from vLLM 0.32, and what is known of 0.33:

| from | used | 0.33 |
|---|---|---|
| `engine.arg_utils` | `EngineArgs(...).create_engine_config()` | same |
| `model_executor.model_loader` | `get_model` | same |
| `v1.worker.gpu.attn_utils` | `get_kv_cache_spec`, `init_attn_backend`, `init_kv_cache` | same bodies |
| `v1.core.kv_cache_utils` | `get_kv_cache_configs` | moved to `v1.core.kv_cache_planning` |
| `v1.attention.backends.utils` | `get_supported_kv_cache_layouts`, `resolve_kv_cache_layout` | same |
| `v1.attention.backend` | `CommonAttentionMetadata` | only additions |
| `forward_context` | `create_forward_context`, `override_forward_context` | same signatures |
| `v1.worker.gpu_worker` | `init_worker_distributed_environment` (own process only) | same |
| `v1.worker.cpu_model_runner` | `_set_torch_accelerator_to_noop` (CPU only) | identical file |

The model is made under a VllmConfig of its own. One derived from the target's (`vllm.config.utils.replace`) would share
its `compilation_config`, and the draft's layers would become KV layers of the target.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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

from vllm_saguaro.drafting.model import Batch

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_configs  # 0.33
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs  # 0.32

logger = init_logger(f"vllm.{__name__}")  # below "vllm": only there has vLLM's logging a handler

CPU_BLOCK_SIZE = 32
"""CPU_ATTN takes multiples of 32 alone: its AMX layout interleaves the tokens of a block."""


@dataclass(frozen=True, slots=True)
class DraftModelConfig:
    """How the draft is loaded and how large it may grow. Plain values only, so that it travels as JSON."""

    model: str
    max_length: int
    """Longest text in tokens."""
    max_rows: int
    """Most rows in one forward: the branches of all requests together."""
    kv_cache_bytes: int
    """Budget of the KV cache; raised to what one text of `max_length` needs."""
    max_tokens: int = 2048
    vocab_size: int | None = None
    """The target's vocabulary size. Families pad it differently, and every draft must be a token of the target."""
    dtype: str = "auto"
    device: str = "cpu"
    enforce_eager: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
    code_revision: str | None = None
    quantization: str | None = None
    attention_backend: str | None = None
    load_format: str = "auto"


class VllmDraftModel:
    """`DraftModel` by vLLM, in a process of its own or inside a vLLM worker (with TP = PP = 1). Not thread-safe."""

    def __init__(self, config: DraftModelConfig) -> None:
        self.device = torch.device(config.device)
        self._is_cpu = self.device.type == "cpu"
        self._owns_process = not parallel_state.model_parallel_is_initialized()
        shards = () if self._owns_process else (parallel_state.get_tp_group(), parallel_state.get_pp_group())
        if any(group.world_size > 1 for group in shards):
            # Layers read the process's TP and PP groups: the draft would be cut up and wait for the other ranks.
            raise RuntimeError(
                "The draft model cannot share a worker with tensor or pipeline parallelism: give it a process."
            )
        # In a worker the process's environment speaks of the target (LOCAL_WORLD_SIZE, LD_PRELOAD): leave it as it was.
        with contextlib.nullcontext() if self._owns_process else _environment_kept():
            self.vllm_config = _engine_config(config)
        if self.vllm_config.model_config.uses_mrope:
            raise ValueError(f"{config.model}: models with multi-dimensional rotary positions cannot draft.")
        self._prepare_platform()
        with set_current_vllm_config(self.vllm_config):
            with set_model_tag("saguaro_draft"):
                self.model = get_model(vllm_config=self.vllm_config)
            kv_config = _plan_kv_cache(self.vllm_config, config)
            attn_groups, _, kernel_block_sizes = init_attn_backend(kv_config, self.vllm_config, self.device)
            layers = self.vllm_config.compilation_config.static_forward_context
            kv_caches = init_kv_cache(layers, kv_config, self.device, kernel_block_sizes, self.vllm_config)

        own_vocab_size = self.vllm_config.model_config.get_vocab_size()
        self.vocab_size = min(own_vocab_size, config.vocab_size or own_vocab_size)
        self.hidden_size = self.vllm_config.model_config.get_hidden_size()
        self.block_size = self.vllm_config.cache_config.block_size
        self.num_blocks = kv_config.num_blocks
        self.max_length = config.max_length
        self.max_tokens = config.max_tokens
        self.max_rows = config.max_rows
        if kernel_block_sizes != [self.block_size]:
            raise ValueError(
                f"{config.model}: the attention kernels want KV blocks of {kernel_block_sizes} tokens, not of "
                f"{self.block_size}; choose another attention_backend for the draft."
            )
        self._attn_groups = attn_groups[0]
        self._layer_names = [name for group in self._attn_groups for name in group.layer_names]
        self._pages = _pages(kv_config, kv_caches)
        self._context = create_forward_context(None, self.vllm_config)
        self._row_ids = np.arange(config.max_rows)
        self._is_warm = False
        logger.info(
            "Draft model %s: %s on %s, %d KV blocks of %d tokens, vocabulary %d of %d.",
            *(config.model, self.vllm_config.model_config.dtype, self.device, self.num_blocks, self.block_size),
            *(self.vocab_size, own_vocab_size),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write the KV of every token of `batch`; return hidden states [T, hidden_size] in the model's dtype."""
        if not self._is_warm:
            self.warm_up()  # a first forward of one token would corrupt the heap (see there)
        return self._forward(batch)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab_size] float32 of hidden states [R, hidden_size]."""
        return self.model.compute_logits(hidden)[:, : self.vocab_size].float()

    @torch.inference_mode()
    def greedy(self, hidden: torch.Tensor) -> np.ndarray:
        """The likeliest token [R] int64, on the host, after each of the hidden states [R, hidden_size]."""
        if self._is_cpu:
            # torch's argmax is scalar on the CPU: 10 to 60 times slower than numpy's.
            return self.logits(hidden).numpy().argmax(axis=-1)
        return self.logits(hidden).argmax(dim=-1).cpu().numpy()

    @torch.inference_mode()
    def copy_blocks(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of whole blocks in every layer, source[i] to destination[i]; the two are disjoint."""
        if self._is_cpu:
            # One strided copy a block, all layers at once: 2 to 8 times faster here than index_select and index_copy_.
            for pages in self._pages:
                for src, dst in zip(source, destination, strict=True):
                    pages[:, dst].copy_(pages[:, src])
            return
        src_ids = torch.tensor(source, dtype=torch.int64, device=self.device)
        dst_ids = torch.tensor(destination, dtype=torch.int64, device=self.device)
        for pages in self._pages:
            pages.index_copy_(1, dst_ids, pages.index_select(1, src_ids))  # the gather is a clone: no view overlaps

    def warm_up(self, rows: Iterable[int] = ()) -> None:
        """Compile, and run the row counts `rows` once each. Only before any KV is held: it overwrites the first blocks.

        The very first forward has many tokens: a graph compiled with one token is specialised to it, and as vLLM drops
        the guards, every other size then corrupts the heap.
        """
        self._is_warm = True
        length = max(2, min(self.max_length, self.max_tokens, 2 * self.block_size))
        most_rows = min(self.max_rows, self.max_tokens)
        row_counts = [min(count, most_rows) for count in sorted({1, 2, *rows}, reverse=True)]
        # Inductor's compile workers are processes: not allowed in a daemonic process, and wasted on one graph.
        inductor_settings = torch._inductor.config.patch(compile_threads=1)
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config), inductor_settings:
            self.logits(self._forward(_text_batch(length, self.block_size)))
            for count in row_counts:
                self.logits(self._forward(_decode_batch(count)))

    def close(self) -> None:
        """Give back weights and KV and, in a process of its own, vLLM's process groups. The end of the model."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            if hasattr(layer, "kv_cache"):
                layer.kv_cache = torch.tensor([])
        self._pages = []
        self._attn_groups = []
        self.model = None
        self.vllm_config.compilation_config.static_forward_context.clear()
        gc.collect()  # modules and their config refer to each other
        if self._owns_process and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()

    def _prepare_platform(self) -> None:
        """What a vLLM worker does before it loads a model."""
        if self._is_cpu:
            from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

            _set_torch_accelerator_to_noop()  # get_model empties the accelerator's cache, which raises without one
            if torch.cpu._is_amx_tile_supported():
                torch.cpu._init_amx()  # else a first forward of one row runs AMX before the kernel permits it: SIGILL
        if not self._owns_process:
            return
        # Else RMSNorm stays an opaque operator inside the compiled graph, and runs as eight eager ones.
        vllm.ir.set_default_torch_wrap(self.vllm_config.compilation_config.ir_enable_torch_wrap)
        self.vllm_config.kernel_config.ir_op_priority.set_default()
        if self._is_cpu:
            cores = len(os.sched_getaffinity(0))
            if torch.get_num_threads() > cores:
                torch.set_num_threads(cores)  # torch counts cores at import; the affinity may be set after it
        else:
            from vllm.v1.worker.workspace import init_workspace_manager

            torch.accelerator.set_device_index(self.device)
            init_workspace_manager(self.device, 1)
        # A file as meeting point: a port could be taken by another engine between choice and use.
        folder = tempfile.mkdtemp(prefix="saguaro_draft_")
        self._init_distributed(f"file://{folder}/rendezvous")

    def _init_distributed(self, init_method: str) -> None:
        from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

        local_rank = self.device.index or 0
        with set_current_vllm_config(self.vllm_config):
            init_worker_distributed_environment(
                self.vllm_config, 0, init_method, local_rank, current_platform.dist_backend
            )

    def _forward(self, batch: Batch) -> torch.Tensor:
        num_tokens = batch.token_ids.shape[0]
        num_rows = batch.lengths.shape[0]
        block_size = self.block_size
        if num_tokens == num_rows:
            max_query_len, row_of_token = 1, self._row_ids[:num_rows]
        else:
            query_lengths = np.diff(batch.query_start)
            max_query_len, row_of_token = int(query_lengths.max()), np.repeat(self._row_ids[:num_rows], query_lengths)
        block_of_token, place_in_block = np.divmod(batch.positions, block_size)
        slots = batch.blocks[row_of_token, block_of_token] * np.int64(block_size) + place_in_block

        arrays = (batch.query_start, batch.lengths, batch.blocks, batch.positions, slots, batch.token_ids)
        on_host = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        # On the CPU the tensors share the arrays' memory; even a `to` that does nothing would cost 2 us each here.
        on_device = on_host if self._is_cpu else [tensor.to(self.device) for tensor in on_host]
        query_start, lengths, block_table, positions, slot_mapping, token_ids = on_device
        common = CommonAttentionMetadata(
            query_start_loc=query_start,
            query_start_loc_cpu=on_host[0],
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=on_host[1],
            num_reqs=num_rows,
            num_actual_tokens=num_tokens,
            max_query_len=max_query_len,
            max_seq_len=int(batch.lengths.max()),
            block_table_tensor=block_table,
            slot_mapping=slot_mapping,
            positions=positions,
        )
        metadata: dict[str, Any] = {}
        for group in self._attn_groups:
            metadata.update(dict.fromkeys(group.layer_names, group.build_metadata(common)))
        self._context.attn_metadata = metadata
        self._context.slot_mapping = dict.fromkeys(self._layer_names, slot_mapping)
        with override_forward_context(self._context):
            return self.model(input_ids=token_ids, positions=positions)


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what is done to the environment variables inside."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _engine_config(config: DraftModelConfig) -> VllmConfig:
    backend = config.attention_backend
    return EngineArgs(
        model=config.model,
        dtype=config.dtype,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        code_revision=config.code_revision,
        quantization=config.quantization,
        load_format=config.load_format,
        enforce_eager=config.enforce_eager,
        attention_backend=AttentionBackendEnum[backend] if backend else None,
        max_model_len=config.max_length,
        max_num_seqs=config.max_rows,
        max_num_batched_tokens=max(config.max_tokens, config.max_rows),
        block_size=CPU_BLOCK_SIZE if config.device == "cpu" else None,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        # Sliding-window layers then keep their whole past like the others: one KV group, one block table a row.
        disable_hybrid_kv_cache_manager=True,
    ).create_engine_config()


def _plan_kv_cache(vllm_config: VllmConfig, config: DraftModelConfig) -> KVCacheConfig:
    """One pool of blocks within the budget, at least enough for one text of the greatest length."""
    specs = get_kv_cache_spec(vllm_config)
    if not specs or not all(isinstance(spec, AttentionSpec) for spec in specs.values()):
        kinds = sorted({type(spec).__name__ for spec in specs.values()}) or ["no KV cache at all"]
        raise ValueError(f"{config.model} cannot draft: every layer must have an attention KV cache, found {kinds}.")
    backends = get_current_attn_backends(vllm_config)
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())  # EngineCore's task, and there is none here

    # vLLM refuses a budget below one text of max_model_len and the null block that its scheduler would hold back.
    bytes_per_block = sum(spec.page_size_bytes for spec in specs.values())
    least = (-(-config.max_length // vllm_config.cache_config.block_size) + 1) * bytes_per_block
    if least > config.kv_cache_bytes:
        logger.warning("Draft KV budget raised from %d to %d bytes: one text's worth.", config.kv_cache_bytes, least)
    kv_config = get_kv_cache_configs(vllm_config, [specs], [max(least, config.kv_cache_bytes)])[0]
    if len(kv_config.kv_cache_groups) != 1:
        raise ValueError(
            f"{config.model} cannot draft: a branch has one block table, but the layers form "
            f"{len(kv_config.kv_cache_groups)} KV cache groups."
        )
    vllm_config.cache_config.num_gpu_blocks = kv_config.num_blocks
    return kv_config


def _pages(kv_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Views int8 [layers, num_blocks, bytes] of the allocation, whichever of layer and block is outermost in it."""
    views = []
    for tensor in kv_config.kv_cache_tensors:
        cache = kv_caches[tensor.layers[0]]
        page_bytes = cache[0].numel() * cache.element_size()
        raw = torch.empty(0, dtype=torch.int8, device=cache.device).set_(cache.untyped_storage())
        shape = (len(tensor.layers), kv_config.num_blocks, page_bytes)
        views.append(raw.as_strided(shape, (tensor.layer_stride, tensor.block_stride, 1), tensor.offset))
    return views


def _text_batch(length: int, block_size: int) -> Batch:
    """One row that feeds `length` tokens from position 0."""
    return Batch(
        token_ids=np.zeros(length, np.int64),
        positions=np.arange(length, dtype=np.int64),
        query_start=np.array([0, length], np.int32),
        lengths=np.array([length], np.int32),
        blocks=np.arange(-(-length // block_size), dtype=np.int32)[None],
    )


def _decode_batch(rows: int) -> Batch:
    """Each of `rows` rows feeds its first token; the rows overwrite each other's KV in block 0."""
    return Batch(
        token_ids=np.zeros(rows, np.int64),
        positions=np.zeros(rows, np.int64),
        query_start=np.arange(rows + 1, dtype=np.int32),
        lengths=np.ones(rows, np.int32),
        blocks=np.zeros((rows, 1), np.int32),
    )
