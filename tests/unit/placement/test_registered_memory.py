from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_saguaro.placement.registered_memory import RegisteredMemory


def test_memory_that_the_device_does_not_see_is_not_left_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = set[int]()

    def register(address: int, size: int, flags: int) -> int:
        registered.add(address)
        return 0

    def give_back(address: int) -> int:
        registered.remove(address)
        return 0

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no unified addressing")

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=give_back)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "as_tensor", refuse)
    with pytest.raises(RuntimeError, match="no unified addressing"):
        RegisteredMemory(memoryview(bytearray(64)), torch.device("cuda"))
    assert registered == set()
