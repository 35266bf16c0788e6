"""What a test asks of every rank of an engine with runner V2: functions that `LLM.collective_rpc` runs in each."""

from __future__ import annotations

import os
from typing import Any

Record = tuple[str, list[int], list[int]]
"""A request, its text as this rank has it, and the drafts that this rank will verify next."""


def record(worker: Any) -> None:
    """From now on write down, after each step, the text of every request as this rank has it, and its drafts."""
    runner = worker.model_runner
    states, speculator = runner.req_states, runner.speculator
    runner.test_records = []
    original = speculator.propose

    def propose(batch: Any, *others: Any, **named: Any) -> Any:
        drafts = original(batch, *others, **named)
        for row, (request_id, slot) in enumerate(zip(batch.req_ids, batch.idx_mapping_np.tolist(), strict=True)):
            text = states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])].tolist()
            runner.test_records.append((request_id, text, drafts[row].tolist()))
        return drafts

    speculator.propose = propose


def take_records(worker: Any) -> list[Record]:
    """What was written down since the last time."""
    records = list(worker.model_runner.test_records)
    worker.model_runner.test_records.clear()
    return records


def go_apart(worker: Any) -> None:
    """The planted fault: each rank samples and drafts for itself, as vLLM's ranks do, and one alone has a draft."""
    runner = worker.model_runner
    worker._speculator.ranks = None
    runner.postprocess_sampled = runner.postprocess_sampled.args[-1]


def facts(worker: Any) -> dict[str, Any]:
    """What is true of this rank."""
    config, speculator = worker.vllm_config, worker._speculator
    ours = getattr(worker, "worker", worker)  # a process of a rank has vLLM's wrapper around it
    return {
        "pid": os.getpid(),
        "worker": type(ours).__name__,
        "async": config.scheduler_config.async_scheduling,
        "has a draft": speculator._draft is not None,
        "has q": speculator.draft_logits is not None,
        "blocks": int(worker.model_runner.kv_cache_config.num_blocks),
    }
