"""The process of one engine, with an engine that is made up here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_saguaro import vllm_hooks
from vllm_saguaro.tuning.worker import TuningWorker


def test_draft_model_is_measured_under_either_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runner V2 has no call of the drafts that could be timed, and nothing but tokens a second is asked for."""
    llm = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(encode=lambda text: list(text.encode())))
    monkeypatch.setattr(TuningWorker, "load", lambda self, order: llm)
    sampler = SimpleNamespace(mend_kernel=lambda: None)
    monkeypatch.setitem(sys.modules, "vllm_saguaro.vllm_hooks.cpu_sampler", sampler)
    monkeypatch.setattr(vllm_hooks, "cpu_sampler", sampler, raising=False)
    order: dict[str, Any] = {
        "llm": {"speculative_config": {"method": "draft_model"}},
        "watched": False,
        "forecasts": False,
        "prompts": ["abc"],
        "prompt_tokens": 2,
    }
    worker = TuningWorker(order)
    assert worker.stopwatch.seconds == 0.0
    assert worker.prompts == [[98, 99]]
