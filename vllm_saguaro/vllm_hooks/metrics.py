"""Our counters among vLLM's metrics: in `LLM.get_metrics()` and at the server's `/metrics` alike.

vLLM offers stat loggers to the server alone, and carries no foreign numbers from a worker to its front end (read in
0.32 and 0.33: `v1/metrics/loggers.py`, `v1/metrics/reader.py`, `v1/metrics/prometheus.py`). So the worker counts on a
shared page, and the front end registers one collector that reads the page when asked. The page is a memfd of the
front end, opened by the worker through /proc: it has no name, so nothing is left of it. `PrometheusStatLogger`
unregisters collectors that have a `_name` beginning with "vllm:"; this one has none.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vllm_saguaro.counters import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, PAGE_BYTES, CounterPage
from vllm_saguaro.placement.memfd import sealed_memfd

_PAGE_NAME = "saguaro-counters"
_LABELS = ("model_name", "engine")


class SaguaroCollector:
    """Turns one engine's counter page into Prometheus metrics named in vLLM's style."""

    def __init__(self, page: CounterPage, model_name: str, engine: str) -> None:
        self.page = page
        self._labels = (model_name, engine)

    def collect(self) -> Iterator[Metric]:
        """All counters, gauges and histograms as they are now."""
        families: dict[str, CounterMetricFamily] = {}
        for counter in COUNTERS:
            labels = (*_LABELS, counter.label_name) if counter.label else _LABELS
            family = families.get(counter.name)
            if family is None:
                family = CounterMetricFamily(f"vllm:{counter.name}", counter.documentation, labels=labels)
                families[counter.name] = family
            values = (*self._labels, counter.label) if counter.label else self._labels
            family.add_metric(values, self.page.value(counter))
        yield from families.values()
        for gauge in GAUGES:
            level = GaugeMetricFamily(f"vllm:{gauge.name}", gauge.documentation, labels=_LABELS)
            # None where there is none: who adds up or averages over engines would get nothing from "not a number".
            if not math.isnan(value := self.page.value(gauge)):
                level.add_metric(self._labels, value)
            yield level
        for histogram in HISTOGRAMS:
            family = HistogramMetricFamily(f"vllm:{histogram.name}", histogram.documentation, labels=_LABELS)
            cumulative, buckets = 0.0, []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.page.bins(histogram), strict=True):
                cumulative += count
                buckets.append((bound, cumulative))
            family.add_metric(self._labels, buckets=buckets, sum_value=self.page.total(histogram))
            yield family


class _Registered:
    """The collector that this process has registered, if any: a new engine's takes the place of the old one's.

    Two of them would announce the same names twice, which a scraper refuses. Several engines behind one server are told
    apart by vLLM through data parallelism, which this method does not serve yet.
    """

    current: SaguaroCollector | None = None


def open_page(model_name: str) -> str | None:
    """Front end: make a new engine's page and register its collector. Returns where a worker on this host finds it."""
    if not hasattr(os, "memfd_create"):
        return None
    fd = sealed_memfd(_PAGE_NAME, PAGE_BYTES)
    page = CounterPage(memoryview(mmap.mmap(fd, PAGE_BYTES)), new=True)
    if _Registered.current is not None:
        REGISTRY.unregister(_Registered.current)
    _Registered.current = SaguaroCollector(page, model_name, "0")
    REGISTRY.register(_Registered.current)
    return f"/proc/{os.getpid()}/fd/{fd}"


def attach_page(path: str | None) -> CounterPage:
    """Worker: the page at `path`, or one of its own where there is none (another host, another system)."""
    # Elsewhere (another host, another PID namespace) the same path may be some other file of some other process.
    if path is None or not os.path.islink(path) or not os.readlink(path).startswith(f"/memfd:{_PAGE_NAME}"):
        return CounterPage()
    with open(path, "r+b") as file:
        return CounterPage(memoryview(mmap.mmap(file.fileno(), PAGE_BYTES)))
