from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from vllm_saguaro.cli.exposition import Snapshot, samples

TEXT = r"""
# HELP vllm:x_total Something.
# TYPE vllm:x_total counter
vllm:x_total{cause="late",model_name="a"} 3.0
vllm:x_total{cause="late",model_name="b"} 2.0
vllm:x_total{cause="absent",model_name="a"} 1e1 1700000000000
vllm:plain 4
vllm:odd{path="C:\\dir",quote="say \"{hi}\"",line="a\nb"} 2.5
vllm:unknown NaN
vllm:endless +Inf
vllm:beyond 1e999
vllm:nothing{a="b"} many
just words
"""


def test_numbers_are_summed_over_the_labels_that_are_not_asked_for() -> None:
    snapshot = Snapshot(TEXT)
    assert snapshot.total("vllm:x_total") == 15
    assert snapshot.by("vllm:x_total", "cause") == {"late": 5, "absent": 10}
    assert snapshot.total("vllm:plain") == 4
    assert snapshot.total("vllm:unheard_of") == 0
    assert "vllm:plain" in snapshot
    assert "vllm:nothing" not in snapshot
    assert snapshot
    assert not Snapshot("# only a comment"), "a server that does not answer has none"


def test_escapes_and_braces_in_labels_are_read() -> None:
    (odd,) = [sample for sample in samples(TEXT) if sample.name == "vllm:odd"]
    assert odd.labels == {"path": "C:\\dir", "quote": 'say "{hi}"', "line": "a\nb"}
    assert odd.value == 2.5


def test_what_is_no_finite_number_is_left_out() -> None:
    snapshot = Snapshot(TEXT)
    assert not [name for name in ("vllm:unknown", "vllm:endless", "vllm:beyond") if name in snapshot]
    assert "vllm:odd" in snapshot


def test_what_prometheus_writes_is_read_back() -> None:
    registry = CollectorRegistry()
    counter = Counter("hits", "Hits.", ["cause"], registry=registry)
    counter.labels('a "quoted" one').inc(7)
    histogram = Histogram("wait_seconds", "Waits.", buckets=(0.1, 1.0), registry=registry)
    for seconds in (0.05, 0.5, 5.0):
        histogram.observe(seconds)
    snapshot = Snapshot(generate_latest(registry).decode())
    assert snapshot.by("hits_total", "cause") == {'a "quoted" one': 7}
    assert snapshot.bins("wait_seconds") == {0.1: 1, 1.0: 2, math.inf: 3}
    assert snapshot.total("wait_seconds_sum") == 5.55
