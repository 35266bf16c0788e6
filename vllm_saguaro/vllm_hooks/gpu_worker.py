"""The worker door on CUDA: `parallel_config.worker_cls` names this class (vLLM 0.32 and 0.33)."""

from __future__ import annotations

import contextlib
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_saguaro.vllm_hooks.device_worker import DeviceDraftWorker
from vllm_saguaro.vllm_hooks.target_first import captured_first, set_target_stream


class SaguaroGPUWorker(DeviceDraftWorker, Worker):
    """vLLM's GPU worker with a draft beside the target. No GPU has run it yet (docs/gpu.md).

    Where the draft shares the GPU the target goes first: its stream, and the graphs that are captured for it.
    """

    def _make_model_runner(self) -> Any:
        if self._shares_the_device:
            set_target_stream(self.device)
        return super()._make_model_runner()

    def determine_available_memory(self) -> int:
        """Measure what is left for the target's KV cache."""
        with self._captures():
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, and capture the graphs: the target's, then the draft's."""
        with self._captures():
            return super().compile_or_warm_up_model()

    @property
    def _shares_the_device(self) -> bool:
        return self._options["placement"] == "stream"

    def _captures(self) -> contextlib.AbstractContextManager[None]:
        return captured_first() if self._shares_the_device else contextlib.nullcontext()
