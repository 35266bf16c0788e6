"""The dashboard asks for metrics that exist, and for every one of ours."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from scripts.repository import ROOT
from vllm_saguaro.cli.exposition import Sample, samples
from vllm_saguaro.counters import COUNTERS, GAUGES, HISTOGRAMS, SAMPLING_C, CounterPage
from vllm_saguaro.vllm_hooks.metrics import SaguaroCollector

DASHBOARD: dict[str, Any] = json.loads((ROOT / "examples" / "grafana" / "saguaro.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
NAME = re.compile(r"vllm:\w+")
OF_VLLM = {
    "vllm:generation_tokens_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_drafts_total",
}


@pytest.fixture(scope="module")
def exported() -> dict[str, Sample]:
    """What a server's `/metrics` has of ours, by name."""
    registry = CollectorRegistry()
    page = CounterPage()
    page.set(SAMPLING_C, 0.5)  # it is not always there
    registry.register(SaguaroCollector(page, "model", "0"))
    return {sample.name: sample for sample in samples(generate_latest(registry).decode())}


def test_every_metric_that_is_asked_for_is_exported(exported: dict[str, Sample]) -> None:
    asked = {name for expression in EXPRESSIONS for name in NAME.findall(expression)}
    assert {name for name in asked if name.startswith("vllm:saguaro_")} <= exported.keys()
    assert {name for name in asked if not name.startswith("vllm:saguaro_")} == OF_VLLM


def test_every_metric_of_ours_is_shown(exported: dict[str, Sample]) -> None:
    asked = "\n".join(EXPRESSIONS)
    ours = {metric.name for kind in (COUNTERS, GAUGES, HISTOGRAMS) for metric in kind}
    assert [
        name for name in sorted(ours) if not re.search(rf"vllm:{name}(_total|_seconds)?\b|vllm:{name}_", asked)
    ] == []


def test_labels_that_are_grouped_by_exist(exported: dict[str, Sample]) -> None:
    for expression in EXPRESSIONS:
        for label in re.findall(r"by \((\w+)\)", expression):
            names = [name for name in NAME.findall(expression) if name in exported]
            if names:
                assert label in exported[names[0]].labels, f"{names[0]} has no label {label}"
    assert "model_name" in exported["vllm:saguaro_hits_total"].labels


def test_quantiles_are_of_buckets_by_their_bound() -> None:
    quantiles = [expression for expression in EXPRESSIONS if "histogram_quantile" in expression]
    assert quantiles
    assert all("_bucket{" in expression and "by (le)" in expression for expression in quantiles)


def test_parentheses_match_and_panels_do_not_overlap() -> None:
    for expression in EXPRESSIONS:
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)
