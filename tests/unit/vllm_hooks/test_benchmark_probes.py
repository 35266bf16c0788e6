"""The stopwatch; what watches forecasts is in tests/unit/benchmark/test_bench_forecasts.py, with the forecasts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_saguaro.vllm_hooks import benchmark_probes
from vllm_saguaro.vllm_hooks.benchmark_probes import Stopwatch


def test_stopwatch_adds_up_even_when_a_call_fails() -> None:
    stopwatch = Stopwatch()
    sleep = stopwatch.wrap(time.sleep)
    sleep(0.02)
    with pytest.raises(TypeError):
        sleep("long")
    assert stopwatch.seconds >= 0.02


def test_the_drafting_of_runner_v1_is_timed_and_that_of_v2_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_probes, "runner_of", lambda llm: llm)
    runner: Any = SimpleNamespace(propose_draft_token_ids=lambda: time.sleep(0.02))
    stopwatch = benchmark_probes.watch_drafting(runner)
    runner.propose_draft_token_ids()
    assert stopwatch.seconds >= 0.02
    runner = SimpleNamespace()
    assert benchmark_probes.watch_drafting(runner).seconds == 0.0
    assert vars(runner) == {}
