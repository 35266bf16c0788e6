"""Calls that are captured once as CUDA graphs and replayed; without a capture, as on a CPU, they are simply made."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

Call = Callable[[], None]


class CapturedCalls:
    """Calls by name, with their graphs where there are any. A call's work goes to the stream that is current.

    All graphs share one memory pool that is nobody else's: vLLM's graphs run at the same time as these, and graphs that
    share a pool must not. For the same reason none of these may run beside another of these: they are all replayed on
    one stream. What a call leaves behind must lie in tensors from before the capture: memory of the pool is reused.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def __contains__(self, name: object) -> bool:
        return name in self._graphs

    def run(self, name: Hashable, call: Call) -> None:
        """Replay the graph of that name, or make the call."""
        graph = self._graphs.get(name)
        if graph is None:
            call()
        else:
            graph.replay()

    def capture(self, name: Hashable, call: Call, prepare: Call, stream: torch.cuda.Stream) -> None:
        """Make the graph of a call, on the stream that it will be replayed on. Once a name; on CUDA alone.

        `prepare` is called before the warm-up and again before the capture. The warm-up compiles kernels and makes what
        a library keeps for a stream (workspaces): neither could be done inside of a capture.
        """
        if name in self._graphs:
            return
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            prepare()
            call()
            stream.synchronize()
            prepare()
            graph = torch.cuda.CUDAGraph()
            # Thread-local: what other threads of the engine allocate meanwhile does not break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                call()
        self._graphs[name] = graph

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphs.clear()
        self._pool = None
