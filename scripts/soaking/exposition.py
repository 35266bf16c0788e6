"""A server's `/metrics` as a table of numbers."""

from __future__ import annotations

from collections.abc import Mapping

Table = dict[str, float]

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
HITS = "vllm:saguaro_hits_total"
DRAFT_UP = "vllm:saguaro_draft_up"
DRAFT_RESTARTS = "vllm:saguaro_draft_restarts_total"
DRAFT_LEFT_OFF = "vllm:saguaro_draft_left_off"
COUNTED = {
    "hits": HITS,
    "misses": "vllm:saguaro_misses_total",
    "late_tables": "vllm:saguaro_late_tables_total",
    "backups": "vllm:saguaro_backups_total",
    "draft_restarts": DRAFT_RESTARTS,
    "quiet_steps": "vllm:saguaro_quiet_steps_total",
    "accepted_drafts": "vllm:spec_decode_num_accepted_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "preemptions": PREEMPTIONS,
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
}
"""What a slice reports, by its name in the report."""


def read(text: str) -> Table:
    """Prometheus' text format as `name{labels}` -> number, comments and what is no number left out."""
    table: Table = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        try:
            table[name] = float(value)
        except ValueError:
            continue
    return table


def total(table: Mapping[str, float], name: str) -> float:
    """One metric, summed over its labels; 0 if it is not there."""
    return sum(value for key, value in table.items() if key == name or key.startswith(name + "{"))


def counted(table: Mapping[str, float]) -> dict[str, float]:
    """The counters of `COUNTED`."""
    return {short: total(table, name) for short, name in COUNTED.items()}
