"""What the CPU worker leaves to the draft of the memory that the KV cache may have, and a draft that does not open."""

from __future__ import annotations

import types
from typing import Any

import pytest
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.vllm_hooks.draft_options import KV_BYTES
from vllm_saguaro.vllm_hooks.worker import SaguaroWorker

BUDGET = KV_BYTES["cpu"]
RESIDENT = 300 << 20
WANTED = 64 << 30


def left(monkeypatch: pytest.MonkeyPatch, resident: int = RESIDENT, **options: Any) -> int:
    """Of `WANTED` bytes, for a draft process that has `resident` bytes here."""
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda worker: worker.requested_cpu_memory)
    worker: Any = SaguaroWorker.__new__(SaguaroWorker)
    worker._options = {
        "cores": None,
        "placement": "process",
        "draft_replicas": 1,
        "draft_pool": None,
        "draft_pool_engines": 4,
        **options,
    }
    worker._channel, worker._former = types.SimpleNamespace(resident_bytes=resident), None
    worker.cache_config = types.SimpleNamespace(kv_cache_memory_bytes=None)
    worker.requested_cpu_memory = WANTED
    return int(worker.determine_available_memory())


def test_each_draft_has_a_budget_and_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left(monkeypatch) == WANTED - BUDGET - RESIDENT
    assert left(monkeypatch, draft_replicas=3) == WANTED - 3 * BUDGET - RESIDENT


def test_the_engines_of_a_pool_on_its_node_take_a_part_of_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled: dict[str, Any] = {"placement": "ray", "draft_pool": "drafts", "draft_pool_engines": 4}
    taken = WANTED - left(monkeypatch, **pooled)
    assert 4 * taken == 4 * BUDGET + RESIDENT


def test_a_draft_on_another_node_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left(monkeypatch, resident=0, placement="ray") == WANTED
    assert left(monkeypatch, resident=0, placement="ray", draft_pool="drafts") == WANTED


def test_a_replica_that_cannot_be_opened_leaves_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    def open_draft(_: SaguaroWorker, config: SaguaroConfig, cpus: Any, shape: Any, number: int) -> Any:
        if number == 2:
            raise OSError("no more processes")
        return types.SimpleNamespace(close=lambda: closed.append(number))

    monkeypatch.setattr(SaguaroWorker, "_open_draft", open_draft)
    worker: Any = SaguaroWorker.__new__(SaguaroWorker)
    worker._options = {"cores": None}
    config = SaguaroConfig(draft_replicas=3)
    with pytest.raises(OSError, match="no more processes"):
        worker._open_channel(config, types.SimpleNamespace(slots=8))
    assert sorted(closed) == [0, 1]
