"""The worker door for runner V2 on vLLM's CPU backend, which needs a Triton that runs there (docs/gpu.md).

A module of its own, because vLLM's CPU worker replaces parts of `torch.cuda` when it is imported.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_saguaro.vllm_hooks.device_worker import DeviceDraftWorker


class SaguaroV2CPUWorker(DeviceDraftWorker, CPUWorker):
    """vLLM's CPU worker with runner V2 and a draft beside the target: how the GPU path is tested."""
