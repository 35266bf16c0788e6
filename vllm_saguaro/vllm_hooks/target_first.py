"""The target before the draft where both want the GPU: CUDA gives the kernels of a stream of higher priority the way.

From vLLM 0.32: `current_stream` of `utils/torch_utils.py`, which makes a worker's stream where none was set, with the
priority that is also the draft's: the last there is. `graph_capture` and `GraphCaptureContext` of
`distributed/parallel_state.py`: kernels of a CUDA graph keep the priority of the stream that they were captured on.
No GPU has run this (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed import parallel_state

TARGET_PRIORITY = -1
"""CUDA's priorities: a lower number goes first. 0 is the last, and what streams have that are made without one."""


def set_target_stream(device: torch.device) -> None:
    """Let this thread work on a stream that goes first. On CUDA, before vLLM's runner is made."""
    stream = torch.cuda.Stream(device, priority=TARGET_PRIORITY)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)  # vLLM has put its own in the place of torch's: `current_stream` knows of it


@contextlib.contextmanager
def captured_first() -> Iterator[None]:
    """The graphs that vLLM captures inside are captured on streams that go first."""
    original = parallel_state.GraphCaptureContext

    def first(stream: torch.cuda.Stream) -> Any:
        return original(torch.cuda.Stream(stream.device, priority=TARGET_PRIORITY))

    parallel_state.GraphCaptureContext = first
    try:
        yield
    finally:
        parallel_state.GraphCaptureContext = original
