"""What the simulations of this folder need."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _workers_kernels() -> None:
    pytest.importorskip("vllm")
    from tests.exactness.verification import use_the_workers_kernels

    use_the_workers_kernels()


@pytest.fixture(autouse=True, scope="module")
def _no_search_for_cycles() -> Iterator[None]:
    """Lists with an entry a request are made in every pass, and Python would look through them again and again."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()
