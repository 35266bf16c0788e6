"""The kernels run in a process of their own: Triton must see TRITON_INTERPRET before anything imports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.kernels.interpreted import Interpreted


@pytest.fixture(scope="package")
def interpreted() -> Iterator[Interpreted]:
    """The kernels under Triton's interpreter."""
    with Interpreted() as kernels:
        yield kernels
