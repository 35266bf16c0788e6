"""What is looked at of a server's `/metrics`."""

from __future__ import annotations

import aiohttp

from vllm_saguaro import counters
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.reading import ACCEPTED, GENERATED, RUNNING, WAITING, name_of

CACHE_USAGE = "vllm:kv_cache_usage_perc"
HITS = name_of(counters.HITS)
DRAFT_UP = name_of(counters.DRAFT_UP)
DRAFT_RESTARTS = name_of(counters.DRAFT_RESTARTS)
DRAFT_LEFT_OFF = name_of(counters.DRAFT_LEFT_OFF)
COUNTED = {
    "hits": HITS,
    "misses": "vllm:saguaro_misses_total",
    "late_tables": name_of(counters.LATE_TABLES),
    "backups": "vllm:saguaro_backups_total",
    "draft_restarts": DRAFT_RESTARTS,
    "quiet_steps": name_of(counters.QUIET_STEPS),
    "accepted_drafts": ACCEPTED,
    "generated_tokens": GENERATED,
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
}
"""What a stretch reports, by its name in the report. All labels of a metric are summed."""
IDLE = {"running": RUNNING, "waiting": WAITING, "cache_usage": CACHE_USAGE}
"""What is 0 at a server that has nothing to do."""


async def look(session: aiohttp.ClientSession, url: str) -> Snapshot:
    """The server's metrics now; an empty snapshot from one that does not answer."""
    try:
        async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=30)) as response:
            return Snapshot(await response.text())
    except (aiohttp.ClientError, TimeoutError):
        return Snapshot("")


def numbers(snapshot: Snapshot, names: dict[str, str]) -> dict[str, float]:
    """Some of them, by names of our own."""
    return {ours: snapshot.total(name) for ours, name in names.items()}
