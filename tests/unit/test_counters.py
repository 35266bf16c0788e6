from __future__ import annotations

import math

import pytest

from vllm_saguaro import counters
from vllm_saguaro.counters import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, PAGE_BYTES, CounterPage
from vllm_saguaro.messages import Miss


def test_a_new_page_is_all_zero() -> None:
    page = CounterPage()
    assert [page.value(counter) for counter in COUNTERS] == [0] * len(COUNTERS)
    always = [gauge for gauge in GAUGES if not gauge.sometimes]
    assert [page.value(gauge) for gauge in always] == [0] * len(always)
    for histogram in HISTOGRAMS:
        assert page.bins(histogram) == [0] * (len(BUCKETS) + 1)
        assert page.mean(histogram) == 0
    assert page.hit_rate == 0


def test_no_counter_gauge_or_histogram_shares_a_word_with_another() -> None:
    page = CounterPage()
    for i, counter in enumerate(COUNTERS):
        page.add(counter, i + 1)
    for i, gauge in enumerate(GAUGES):
        page.set(gauge, -1.0 - i)
    for i, histogram in enumerate(HISTOGRAMS):
        for bound in BUCKETS:
            page.observe(histogram, bound * (1 - 0.01 * i))
        page.observe(histogram, 2.0 + i)
    assert [page.value(counter) for counter in COUNTERS] == list(range(1, len(COUNTERS) + 1))
    assert [page.value(gauge) for gauge in GAUGES] == [-1.0 - i for i in range(len(GAUGES))]
    for i, histogram in enumerate(HISTOGRAMS):
        assert page.bins(histogram) == [1] * (len(BUCKETS) + 1)
        assert page.total(histogram) == pytest.approx(sum(BUCKETS) * (1 - 0.01 * i) + 2.0 + i)


@pytest.mark.parametrize(("seconds", "bin_"), [(0.0, 0), (1e-5, 0), (1.1e-5, 1), (1.0, len(BUCKETS) - 1), (1.5, -1)])
def test_a_bucket_holds_the_times_up_to_its_bound(seconds: float, bin_: int) -> None:
    page = CounterPage()
    page.observe(counters.VERIFY, seconds)
    bins = page.bins(counters.VERIFY)
    assert bins[bin_] == 1
    assert sum(bins) == 1


def test_the_mean_is_of_all_observed_times() -> None:
    page = CounterPage()
    for seconds in (0.001, 0.002, 5.0):
        page.observe(counters.DRAFT_ROUND, seconds)
    assert page.total(counters.DRAFT_ROUND) == pytest.approx(5.003)
    assert page.mean(counters.DRAFT_ROUND) == pytest.approx(5.003 / 3)


def test_the_hit_rate_is_of_all_outcomes_whatever_the_cause_of_a_miss() -> None:
    page = CounterPage()
    page.add(counters.HITS, 6)
    for cause in Miss:
        page.add(counters.MISSES[cause])
    page.add(counters.LATE_TABLES, 3)  # these are hits already
    for backup in counters.BACKUPS.values():
        page.add(backup)  # these are misses all the same
    page.add(counters.QUIET_STEPS, 100)  # nothing was looked up
    assert page.hit_rate == pytest.approx(6 / 9)


def test_two_pages_over_one_buffer_see_the_same() -> None:
    buffer = bytearray(PAGE_BYTES)
    writer, reader = CounterPage(memoryview(buffer)), CounterPage(memoryview(buffer))
    writer.add(counters.HITS, 4)
    writer.observe(HISTOGRAMS[-1], 9.0)
    assert reader.value(counters.HITS) == 4
    assert reader.total(HISTOGRAMS[-1]) == 9.0


def test_names_are_unique_but_for_the_label() -> None:
    names = [(counter.name, counter.label) for counter in COUNTERS]
    assert len(set(names)) == len(names)
    levels = {metric.name for metric in (*GAUGES, *HISTOGRAMS)}
    assert len(levels) == len(GAUGES) + len(HISTOGRAMS)
    assert not levels & {name for name, _ in names}
    assert list(BUCKETS) == sorted(BUCKETS)


def test_counters_that_share_a_name_share_the_name_of_their_label() -> None:
    labels: dict[str, set[str]] = {}
    for counter in COUNTERS:
        labels.setdefault(counter.name, set()).add(counter.label_name if counter.label else "")
    assert all(len(names) == 1 for names in labels.values())
    assert {labels[counter.name].copy().pop() for counter in counters.BACKUPS.values()} == {"kind"}


def test_a_gauge_that_is_there_sometimes_is_not_a_number_at_first_and_when_there_is_none() -> None:
    buffer = memoryview(bytearray(PAGE_BYTES))
    for page in (CounterPage(), CounterPage(buffer, new=True)):
        assert math.isnan(page.value(counters.SAMPLING_C))
        page.set(counters.SAMPLING_C, 0.0)
        assert page.value(counters.SAMPLING_C) == 0.0
    assert CounterPage(buffer).value(counters.SAMPLING_C) == 0.0, "who comes later leaves it as it is"
    page.set(counters.SAMPLING_C, None)
    assert math.isnan(CounterPage(buffer).value(counters.SAMPLING_C))


def test_a_gauge_is_what_was_said_last() -> None:
    page = CounterPage()
    for value in (4.0, 2.0, 3.0):
        page.set(counters.DRAFTS, value)
    assert page.value(counters.DRAFTS) == 3
