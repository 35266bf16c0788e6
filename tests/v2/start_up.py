"""What vLLM calls on a GPU between loading and serving, and leaves out on a CPU: done by hand, on a finished engine."""

from __future__ import annotations

from typing import Any

import torch

Json = dict[str, Any]


def walk_through(engine: Any, drafts: list[Any]) -> Json:
    """Profile run, dummy run, warm-up, capture; what the draft heard of each, and what was left behind."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    runner, worker = engine.runner, engine.worker
    speculator, (draft,) = worker._speculator, drafts
    found: Json = {}
    before = speculator.ready.clone()
    runner._dummy_run(64, skip_attn=True, is_profile=True)
    runner._dummy_run(runner.decode_query_len * 2, uniform_decode=True)
    found["after dummy runs"] = [len(draft.events), len(draft.rounds)]
    found["ready untouched"] = bool(torch.equal(before, speculator.ready))
    draft.script = "garbage"
    warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
    found["warm-up"] = sorted({event[0] for event in draft.events})
    found["warm-up rounds"] = len(draft.rounds)
    found["warm-up outcomes"] = sorted({row[2] for row in draft.rounds})
    found["left"] = list(speculator._slots)
    speculator._may_capture = False
    speculator.capture()  # a trial, as while memory is measured
    found["captured in a trial"] = draft.captured
    speculator.cache_is_there()
    speculator.capture()
    speculator.capture()
    found["captured"] = draft.captured
    return found
