"""What a test asks of every rank of an engine: functions that `LLM.collective_rpc` runs in each worker."""

from __future__ import annotations

import os
from typing import Any


def record(worker: Any) -> None:
    """From now on write down, after each step, the text of every request as this rank has it, and its drafts."""
    runner = worker.model_runner
    texts: dict[str, list[int]] = {}
    drafted: list[tuple[str, int, list[int]]] = []
    runner.test_records = texts, drafted
    original = runner.propose_draft_token_ids

    def propose(scheduler_output: Any, sampled: Any, *others: Any) -> Any:
        drafts = original(scheduler_output, sampled, *others)
        batch = runner.input_batch
        for row, request_id in enumerate(batch.req_ids):
            length = int(batch.num_tokens_no_spec[row])
            texts[request_id] = batch.token_ids_cpu[row, :length].tolist()
            drafted.append((request_id, length, list(drafts[row])))
        return drafts

    runner.propose_draft_token_ids = propose


def take_records(worker: Any) -> tuple[dict[str, list[int]], list[tuple[str, int, list[int]]]]:
    """What was written down since the last time."""
    texts, drafted = worker.model_runner.test_records
    found = dict(texts), list(drafted)
    texts.clear()
    drafted.clear()
    return found


def sample_apart(worker: Any) -> None:
    """The planted fault: each rank samples for itself, as vLLM's ranks do, and only one of them knows q."""
    runner = worker.model_runner
    runner._sample = runner._sample.args[-1]


def pid(worker: Any) -> int:
    """The process of this rank."""
    return os.getpid()


def draft_pid(worker: Any) -> int | None:
    """The draft process that this rank has started."""
    return getattr(getattr(worker._channel, "_present", None), "pid", None)


def blocks(worker: Any) -> int:
    """KV blocks of the target on this rank."""
    return int(worker.model_runner.kv_cache_config.num_blocks)
