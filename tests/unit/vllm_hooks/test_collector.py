"""The counters as Prometheus sees them, and the page that a front end and its worker share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.vllm_hooks import metrics
from vllm_saguaro.vllm_hooks.metrics import SaguaroCollector

C = "vllm:saguaro_sampling_c"


@pytest.fixture
def nobody_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics._Registered, "current", None)
    yield
    if metrics._Registered.current is not None:
        REGISTRY.unregister(metrics._Registered.current)


def exported(page: CounterPage) -> list[str]:
    registry = CollectorRegistry()
    registry.register(SaguaroCollector(page, "m", "0"))
    return generate_latest(registry).decode().splitlines()


def test_where_there_is_no_c_none_is_exported() -> None:
    """Not even as "not a number": Prometheus would make that of every sum and mean."""
    page = CounterPage()
    for value in (None, 0.5, None):
        page.set(counters.SAMPLING_C, value)
        found = [line for line in exported(page) if line.startswith(C)]
        assert found == ([] if value is None else [f'{C}{{engine="0",model_name="m"}} 0.5'])
        assert f"# TYPE {C} gauge" in exported(page)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd on this system")
@pytest.mark.usefixtures("nobody_registered")
def test_a_new_page_has_no_c_until_a_worker_says_so() -> None:
    worker = metrics.attach_page(metrics.open_page("m"))
    assert metrics._Registered.current is not None
    front_end = metrics._Registered.current.page
    assert math.isnan(front_end.value(counters.SAMPLING_C))
    worker.set(counters.SAMPLING_C, 0.0)
    assert front_end.value(counters.SAMPLING_C) == 0.0
