"""The stopwatch; what watches forecasts is in tests/unit/benchmark/test_bench_forecasts.py, with the forecasts."""

from __future__ import annotations

import time

import pytest

from vllm_saguaro.vllm_hooks.benchmark_probes import Stopwatch


def test_stopwatch_adds_up_even_when_a_call_fails() -> None:
    stopwatch = Stopwatch()
    sleep = stopwatch.wrap(time.sleep)
    sleep(0.02)
    with pytest.raises(TypeError):
        sleep("long")
    assert stopwatch.seconds >= 0.02
