"""vLLM's V2 noise as it is known here, and a verify pass by it, under Triton's interpreter in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.unit.kernels.interpreted import ROOT
from tests.v2.interpreted import ENVIRONMENT


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.vllm_hooks.coupled_in_vllm"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_vllms_noise_is_known(found: dict[str, Any]) -> None:
    assert found["known"]


@pytest.mark.parametrize("other", ["another position", "double precision", "other parameters", "another call"])
def test_noise_that_is_another_is_seen(found: dict[str, Any], other: str) -> None:
    assert not found[other]


def test_tokens_are_those_of_a_step_without_drafts(found: dict[str, Any]) -> None:
    """Greedy rows and others, whatever is drafted; and each draft that is right is accepted, as far as it may be."""
    assert found["drawn"] == found["plain"]
    assert found["counts"] == [4, 3, 1, 2, 1]
