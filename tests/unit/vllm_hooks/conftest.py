"""Tiny models for vLLM to configure, and its CPU kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.vllm_hooks.model_folder import write_model


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """`write_model`, into a folder of this name."""

    def make(name: str, **changes: Any) -> Path:
        return write_model(tmp_path / name, **changes)

    return make


@pytest.fixture(scope="session")
def worker_kernels() -> None:
    """What vLLM's CPU worker puts in the place of Triton kernels.

    It looks through all loaded modules for them and fails at those of llvmlite, which other tests may have loaded:
    these are out of its sight meanwhile.
    """
    from vllm.platforms import current_platform

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)
