"""What vLLM calls on a GPU between loading and serving, and leaves out on a CPU: done by hand, on a finished engine."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch

Json = dict[str, Any]


def walk_through(engine: Any, drafts: list[Any]) -> Json:
    """Profile run, dummy run, warm-up, capture; what a scripted draft heard of each, and what was left behind."""
    speculator, (draft,) = engine.worker._speculator, drafts
    found: Json = {"ready untouched": _dummy_runs(engine)}
    found["after dummy runs"] = [len(draft.events), len(draft.rounds)]
    draft.script = "garbage"
    _warm_up(engine)
    found["warm-up"] = sorted({event[0] for event in draft.events})
    found["warm-up rounds"] = len(draft.rounds)
    found["warm-up outcomes"] = sorted({row[2] for row in draft.rounds})
    found["left"] = list(speculator._slots)
    found["captured in a trial"], found["captured"] = _captures(engine)
    return found


def walk_through_stream(engine: Any) -> Json:
    """The same with a real draft on a stream: what its engine did, and what it holds afterwards."""
    speculator = engine.worker._speculator
    draft = speculator._draft
    drafting = draft.engine
    before = {field.name: getattr(drafting.state, field.name).clone() for field in dataclasses.fields(drafting.state)}
    free = drafting.ledger.num_free
    found: Json = {"ready untouched": _dummy_runs(engine)}
    found["touched by dummy runs"] = [
        name for name, value in before.items() if not torch.equal(value, getattr(drafting.state, name))
    ]
    with (
        mock.patch.object(drafting, "admit", wraps=drafting.admit) as admitted,
        mock.patch.object(drafting, "work", wraps=drafting.work) as rounds,
    ):
        _warm_up(engine)
    found["warm-up"] = [admitted.call_count, rounds.call_count]
    found["left"] = [*speculator._slots, *drafting._tenants, *draft._requests]
    found["blocks left"] = free - drafting.ledger.num_free
    found["captured in a trial"], found["captured"] = _captures(engine)
    found["alive"] = draft.alive
    return found


def _dummy_runs(engine: Any) -> bool:
    """Whether they left alone what is known of the drafts under verification."""
    runner, speculator = engine.runner, engine.worker._speculator
    before = speculator.ready.clone()
    runner._dummy_run(64, skip_attn=True, is_profile=True)
    runner._dummy_run(runner.decode_query_len * 2, uniform_decode=True)
    return bool(torch.equal(before, speculator.ready))


def _warm_up(engine: Any) -> None:
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    warmup_kernels(engine.runner, engine.worker.execute_model, engine.worker.sample_tokens)


def _captures(engine: Any) -> tuple[int, int]:
    """How often the draft has captured after a trial, as while memory is measured; and after two that count."""
    speculator = engine.worker._speculator
    with mock.patch.object(speculator._draft, "capture", wraps=speculator._draft.capture) as captured:
        speculator._may_capture = False
        speculator.capture()
        in_a_trial = captured.call_count
        speculator.cache_is_there()
        speculator.capture()
        speculator.capture()
    return in_a_trial, captured.call_count
