"""Streams and captures of the target have the higher priority; against stand-ins for CUDA."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch


class Stream:
    """What is asked for of a stream."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.after: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.after.append(other)


def test_the_targets_stream_goes_first_and_after_what_was_there() -> None:
    from vllm_saguaro.vllm_hooks.target_first import set_target_stream

    before, chosen = Stream(), list[Stream]()
    stand_ins: dict[str, Any] = {"Stream": Stream, "current_stream": lambda device: before, "set_stream": chosen.append}
    with mock.patch.multiple(torch.cuda, **stand_ins):
        set_target_stream(torch.device("cuda:1"))
    assert [(s.priority, s.device, s.after) for s in chosen] == [(-1, torch.device("cuda:1"), [before])]


def test_graphs_are_captured_on_a_stream_that_goes_first_and_only_inside() -> None:
    from vllm.distributed import parallel_state

    from vllm_saguaro.vllm_hooks.target_first import captured_first

    original = parallel_state.GraphCaptureContext
    with mock.patch.object(torch.cuda, "Stream", Stream):
        with captured_first():
            context = parallel_state.GraphCaptureContext(Stream("cuda:0"))
            assert (context.stream.priority, context.stream.device) == (-1, "cuda:0")
        assert parallel_state.GraphCaptureContext is original
