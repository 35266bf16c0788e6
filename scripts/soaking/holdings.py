"""What the processes of a server hold, looked at again and again while it works."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from scripts.soaking.processes import Process
from scripts.soaking.server import Server

LOOK_SECONDS = 10.0

Sums = dict[str, dict[str, int]]


def by_name(snapshot: list[Process]) -> Sums:
    """Sums over the processes of one name: how many, bytes of memory, descriptors and threads."""
    table: Sums = {}
    for process in snapshot:
        row = table.setdefault(process.name, {"processes": 0, "memory": 0, "descriptors": 0, "threads": 0})
        row["processes"] += 1
        row["memory"] += process.memory
        row["descriptors"] += process.descriptors
        row["threads"] += process.threads
    return table


async def watch(server: Server, into: list[dict[str, Any]]) -> None:
    """Add the memory of each name, with the seconds since the start, every `LOOK_SECONDS`; until it is cancelled."""
    begin = time.monotonic()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        found = by_name(server.snapshot())
        memory = {name: row["memory"] for name, row in found.items()}
        into.append({"seconds": round(time.monotonic() - begin, 1), "memory": memory})
