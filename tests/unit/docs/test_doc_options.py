"""The tables of options say what `config.py` does: defaults, ranges, words; and the metrics are all there."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_pages import ROOT
from vllm_saguaro import config, counters
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE

WORDS: dict[str, tuple[str, ...]] = {
    "fan_out": config.FAN_OUTS,
    "placement": config.PLACEMENTS,
    "backup": config.BACKUPS,
    "adaptive": ("true", "false"),
}
"""The keys whose range is a list of words."""
NEEDS: dict[str, dict[str, Any]] = {
    "draft_pool_engines": {"placement": "ray", "draft_pool": "drafts"},
    "draft_gpu_memory": {"placement": "stream"},
}
"""What else has to be written for a key to mean anything."""


def rows(page: str) -> dict[str, list[str]]:
    """The cells of every row, by the code in its first cell. A bar within code does not end a cell."""
    lines = re.findall(r"^\| (`[^|]*) \| (.*) \|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {code: rest.split(" | ") for first, rest in lines for code in re.findall(r"`([^`]+)`", first)}


OPTIONS = rows("docs/options.md")


def default_of(key: str) -> Any:
    return next(field.default for field in dataclasses.fields(SaguaroConfig) if field.name == key)


def complaints_of_default(key: str, cell: str) -> list[str]:
    """What is wrong with a cell that says a default."""
    default = default_of(key)
    if key == "adaptive":
        default = SaguaroConfig().chooses_itself  # by placement, where nothing is written
    said = re.match(r"`?([\w.]+)", cell)
    known = str(default).lower() if isinstance(default, bool) else str(default)
    if default is None:
        return [] if "`" not in cell and not cell.isdecimal() else [f"{key}: no default, not {cell}"]
    return [] if said is not None and said[1] == known else [f"{key}: {known}, not {cell}"]


def bounds(cell: str) -> tuple[float | None, float | None]:
    """The least and the greatest number that a range names."""
    between, least = re.search(r"(\d+) to (\d+)", cell), re.search(r"(\d+) or more", cell)
    if between is not None:
        return float(between[1]), float(between[2])
    return (float(least[1]), None) if least is not None else (None, None)


def is_taken(key: str, value: Any) -> bool:
    try:
        SaguaroConfig(**{**NEEDS.get(key, {}), key: value})
    except SaguaroConfigError:
        return False
    return True


@pytest.mark.parametrize("key", config.OWN_KEYS)
def test_the_default_of_a_key_is_what_the_page_says(key: str) -> None:
    assert complaints_of_default(key, OPTIONS[key][0]) == []


@pytest.mark.parametrize("key", [key for key in config.OWN_KEYS if bounds(OPTIONS[key][1]) != (None, None)])
def test_the_range_of_a_number_is_what_the_page_says(key: str) -> None:
    least, most = bounds(OPTIONS[key][1])
    assert least is not None
    whole = key != "sampling_c"
    assert is_taken(key, int(least) if whole else least)
    assert not is_taken(key, int(least) - 1)
    if most is not None:
        assert is_taken(key, int(most) if whole else most)
        assert not is_taken(key, int(most) + 1)
    assert is_taken(key, "auto") == ("`auto`" in OPTIONS[key][1])


def test_the_ranges_that_are_numbers_are_looked_at() -> None:
    numbers = {key for key in config.OWN_KEYS if bounds(OPTIONS[key][1]) != (None, None)}
    assert numbers >= {"branches", "sampling_c", "draft_restarts", "draft_replicas", "draft_pool_engines"}
    assert "more than 0" in OPTIONS["draft_gpu_memory"][1]
    assert not is_taken("draft_gpu_memory", 0)
    assert is_taken("draft_gpu_memory", 0.1)


@pytest.mark.parametrize("key", WORDS)
def test_the_words_of_a_key_are_all_there(key: str) -> None:
    assert set(re.findall(r"`([^`]+)`", OPTIONS[key][1])) == set(WORDS[key])


def test_numbers_within_the_text_are_the_codes() -> None:
    branches = OPTIONS["branches"][2]
    assert f"up to {config.AUTO_MAX_BRANCHES} " in branches
    assert f"always {config.INLINE_BRANCHES};" in branches
    assert f"at most {MAX_ROWS_A_TREE} branches" in branches
    drafts = OPTIONS["num_speculative_tokens"][0]
    assert f"1 to {config.MAX_SPECULATIVE_TOKENS}, default {default_of('num_speculative_tokens')}" in drafts
    method = OPTIONS["draft_sample_method"][0]
    assert set(re.findall(r"`([^`]+)`", method)) >= set(config.DRAFT_SAMPLE_METHODS)
    assert f"`{default_of('draft_sample_method')}` (default, ours)" in method


@pytest.mark.parametrize("metric", [*counters.COUNTERS, *counters.GAUGES, *counters.HISTOGRAMS])
def test_every_metric_has_a_row(metric: counters.Counter | counters.Gauge | counters.Histogram) -> None:
    names = {name.partition("{")[0]: cells for name, cells in OPTIONS.items()}
    assert f"vllm:{metric.name}" in names
    assert names[f"vllm:{metric.name}"][0] == type(metric).__name__.lower()


@pytest.mark.parametrize(
    ("key", "cell"), [("branches", "12"), ("draft_restarts", "`auto`"), ("adaptive", "`false`"), ("draft_pool", "`x`")]
)
def test_a_wrong_default_would_be_noticed(key: str, cell: str) -> None:
    assert complaints_of_default(key, cell)
