"""The worker door on CUDA: `parallel_config.worker_cls` names this class (vLLM 0.32 and 0.33)."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_saguaro.vllm_hooks.device_worker import DeviceDraftWorker


class SaguaroGPUWorker(DeviceDraftWorker, Worker):
    """vLLM's GPU worker with a draft beside the target. No GPU has run it yet (docs/gpu.md)."""
