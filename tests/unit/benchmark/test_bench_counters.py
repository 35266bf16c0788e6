from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from vllm_saguaro.benchmark import counters


@dataclass
class Counter:
    name: str
    value: int
    labels: dict[str, str] = field(default_factory=lambda: {"engine": "0", "model_name": "m"})


@dataclass
class Vector:
    name: str
    values: list[int]
    labels: dict[str, str] = field(default_factory=lambda: {"engine": "0"})


@dataclass
class Histogram:
    name: str
    count: int
    sum: float
    buckets: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=lambda: {"engine": "0"})


def test_all_kinds_of_metrics_become_numbers() -> None:
    table = counters.flatten(
        [
            Counter("vllm:num_preemptions", 7),
            Counter("vllm:spec_decode_num_drafts", 3),
            Vector("vllm:spec_decode_num_accepted_tokens_per_pos", [3, 1]),
            Histogram("vllm:saguaro_verify_seconds", 4, 0.5),
            Counter("vllm:saguaro_misses", 2, {"engine": "0", "cause": "late"}),
        ]
    )
    assert table == {
        "vllm:spec_decode_num_drafts": 3,
        "vllm:spec_decode_num_accepted_tokens_per_pos[0]": 3,
        "vllm:spec_decode_num_accepted_tokens_per_pos[1]": 1,
        "vllm:saguaro_verify_seconds.count": 4,
        "vllm:saguaro_verify_seconds.sum": 0.5,
        "vllm:saguaro_misses{cause=late}": 2,
    }


def test_engines_are_added_up() -> None:
    metrics = [Counter("vllm:saguaro_hits", 3, {"engine": "0"}), Counter("vllm:saguaro_hits", 4, {"engine": "1"})]
    assert counters.flatten(metrics) == {"vllm:saguaro_hits": 7}


def test_only_what_was_counted_in_between() -> None:
    assert counters.difference({"a": 5, "b": 2}, {"a": 3}) == {"a": 2, "b": 2}
    assert counters.added([{"a": 1}, {"a": 2, "b": 3}]) == {"a": 3, "b": 3}


def test_labels_are_summed_or_told_apart() -> None:
    table = {
        "vllm:saguaro_misses{cause=late}": 2.0,
        "vllm:saguaro_misses{cause=absent}": 1.0,
        "vllm:saguaro_misses_of_another_kind": 9.0,
    }
    assert counters.count(table, counters.MISSES) == 3
    assert counters.by_label(table, counters.MISSES) == {"late": 2, "absent": 1}
    assert counters.count({}, counters.MISSES) == 0


def test_vectors_and_means() -> None:
    table = {"v[0]": 5.0, "v[1]": 3.0, "h.count": 4.0, "h.sum": 2.0}
    assert counters.vector(table, "v") == [5, 3]
    assert counters.vector(table, "w") == []
    assert counters.mean(table, "h") == pytest.approx(0.5)
    assert counters.mean(table, "g") is None


def test_a_servers_metrics_are_the_same_table() -> None:
    recorded = Path(__file__).parents[1] / "cli" / "recorded" / "first.txt"
    found = counters.from_exposition(recorded.read_text(encoding="utf-8"))
    assert found[counters.HITS] == 40
    assert counters.by_label(found, counters.MISSES) == {"not_predicted": 6, "late": 59, "absent": 0}
    assert counters.mean(found, counters.VERIFY) is not None
    assert len(counters.vector(found, counters.ACCEPTED_PER_POSITION)) == 4
    assert counters.count(found, counters.GENERATED) > 0
    assert not [name for name in found if "_bucket" in name or "_created" in name or "_total" in name]
