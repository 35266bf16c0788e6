"""How much of the draft's work on the device happens while the target's does, from a profiler's trace."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Span = tuple[float, float]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def overlap_of(trace: Path) -> dict[str, Any]:
    """Of a trace of `torch.profiler` (gzipped): busy milliseconds by stream, and what is hidden.

    The busiest stream is taken for the target's, all others for the draft's. `hidden` is the share of the others' time
    in which the target's stream was busy, too; None where there is one stream alone.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return overlap(json.load(file)["traceEvents"])


def overlap(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The same, of the events themselves."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_DEVICE and event.get("ph") == "X":
            stream = str(event.get("args", {}).get("stream", event.get("tid")))
            spans[stream].append((event["ts"], event["ts"] + event["dur"]))
    merged = {stream: union(found) for stream, found in spans.items()}
    busy = {stream: length(found) for stream, found in merged.items()}
    by_time = sorted(busy, key=lambda stream: -busy[stream])
    milliseconds = {stream: round(busy[stream] / 1000, 3) for stream in by_time}
    if len(by_time) < 2:
        return {"busy_ms": milliseconds, "hidden": None}
    others = union(span for stream in by_time[1:] for span in merged[stream])
    target = merged[by_time[0]]
    both = length(target) + length(others) - length(union([*target, *others]))
    return {"busy_ms": milliseconds, "hidden": round(both / max(length(others), 1e-9), 4)}


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """All of them together."""
    return sum(end - begin for begin, end in spans)
