"""vLLM's metrics as a flat table of numbers that can be subtracted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_saguaro.cli.exposition import samples

PREFIXES = ("vllm:spec_decode_", "vllm:saguaro_")
SERVED_PREFIXES = (*PREFIXES, "vllm:generation_tokens", "vllm:num_requests_")

GENERATED = "vllm:generation_tokens"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"

DRAFTS = "vllm:spec_decode_num_drafts"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
HITS = "vllm:saguaro_hits"
MISSES = "vllm:saguaro_misses"
LATE_TABLES = "vllm:saguaro_late_tables"
BACKUPS = "vllm:saguaro_backups"
QUIET_STEPS = "vllm:saguaro_quiet_steps"
DRAFT_ROUND = "vllm:saguaro_draft_round_seconds"
TARGET_WAIT = "vllm:saguaro_target_wait_seconds"
VERIFY = "vllm:saguaro_verify_seconds"

_LABELS_OF_THE_ENGINE = ("engine", "model_name")


def flatten(metrics: Iterable[Any]) -> dict[str, float]:
    """`LLM.get_metrics()` as name -> number, of the names that start with one of `PREFIXES`.

    A vector becomes `name[0]`, `name[1]` ...; a histogram `name.count` and `name.sum`; a label stays in the name as
    `name{cause=late}`, except those that say which engine it was: engines are summed.
    """
    table: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        table[name] = table.get(name, 0) + value

    for metric in metrics:
        if not metric.name.startswith(PREFIXES):
            continue
        labels = [f"{key}={value}" for key, value in sorted(metric.labels.items()) if key not in _LABELS_OF_THE_ENGINE]
        suffix = "{" + ",".join(labels) + "}" if labels else ""
        if hasattr(metric, "buckets"):
            add(f"{metric.name}.count{suffix}", metric.count)
            add(f"{metric.name}.sum{suffix}", metric.sum)
        elif hasattr(metric, "values"):
            for position, value in enumerate(metric.values):
                add(f"{metric.name}[{position}]{suffix}", value)
        else:
            add(f"{metric.name}{suffix}", metric.value)
    return table


def from_exposition(text: str) -> dict[str, float]:
    """A server's `/metrics` as the same table, of the names that start with one of `SERVED_PREFIXES`.

    A counter has no `_total` here, a histogram no buckets, and a counter by position is a vector.
    """
    table: dict[str, float] = {}
    for sample in samples(text):
        if not sample.name.startswith(SERVED_PREFIXES) or sample.name.endswith(("_created", "_bucket")):
            continue
        labels = {key: value for key, value in sorted(sample.labels.items()) if key not in _LABELS_OF_THE_ENGINE}
        name = sample.name.removesuffix("_total")
        for part in ("count", "sum"):
            if name.endswith(f"_seconds_{part}"):
                name = f"{name.removesuffix(f'_{part}')}.{part}"
        if name == ACCEPTED_PER_POSITION and "position" in labels:
            name += f"[{labels.pop('position')}]"
        if labels:
            name += "{" + ",".join(f"{key}={value}" for key, value in labels.items()) + "}"
        table[name] = table.get(name, 0) + sample.value
    return table


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was counted in between."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def added(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of several tables: one of all repetitions."""
    total: dict[str, float] = {}
    for table in tables:
        for name, value in table.items():
            total[name] = total.get(name, 0) + value
    return total


def count(table: Mapping[str, float], name: str) -> float:
    """A counter, summed over its labels; 0 if nobody counted it."""
    return sum(value for key, value in table.items() if key == name or key.startswith(name + "{"))


def by_label(table: Mapping[str, float], name: str) -> dict[str, float]:
    """A counter by the value of its one label: `{"late": 3, "absent": 1}`."""
    return {
        key.removesuffix("}").rpartition("=")[2]: value for key, value in table.items() if key.startswith(name + "{")
    }


def vector(table: Mapping[str, float], name: str) -> list[float]:
    """A counter by position."""
    values: list[float] = []
    while (key := f"{name}[{len(values)}]") in table:
        values.append(table[key])
    return values


def mean(table: Mapping[str, float], name: str) -> float | None:
    """The mean of a histogram's observations, in its own unit; None without any."""
    observations = count(table, f"{name}.count")
    return count(table, f"{name}.sum") / observations if observations else None
