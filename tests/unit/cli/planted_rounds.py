"""Rounds of a trace as a server would write them, with times that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def named(process: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}


def span(name: str, process: int, start: float, length: float, **arguments: Any) -> dict[str, Any]:
    category = "target" if process == 1 else "draft"
    event = {"name": name, "cat": category, "ph": "X", "ts": start, "dur": length, "pid": process, "tid": 0}
    return {**event, "args": arguments}


def instant(name: str, process: int, at: float, **arguments: Any) -> dict[str, Any]:
    category = "target" if process == 1 else "draft"
    event = {"name": name, "cat": category, "ph": "i", "s": "t", "ts": at, "pid": process, "tid": 0}
    return {**event, "args": arguments}


def outcomes(at: float, step: int, **counts: Any) -> dict[str, Any]:
    every = {"hits": 0, "not_predicted": 0, "late": 0, "absent": 0, "accepted": 0, "backups": 0}
    return instant("outcomes", 1, at, step=step, **{**every, **counts})


def rounds(count: int, begin: float = 1e6, first: int = 1) -> list[dict[str, Any]]:
    """Rounds of 10 ms each: a pass of 8 ms, a draft round from 1 to 7 (the third ones to 9), a wait from 8 to 9.

    Every third one is a miss.
    """
    events: list[dict[str, Any]] = []
    for step in range(first, first + count):
        start, third = begin + 1e4 * (step - first), step % 3 == 0
        events += [
            span("verify", 1, start, 8000.0, step=step, rows=1),
            span("round", 2, start + 1000, 8000.0 if third else 6000.0, step=step, rows=1, branches=12),
            outcomes(start + 8000, step, **({"late": 1} if third else {"hits": 1, "accepted": 2})),
            span("wait", 1, start + 8000, 1000.0, step=step, rows=1),
        ]
    return events


def text(*events: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(event)},\n" for event in events)


def write(path: Path, *events: dict[str, Any]) -> None:
    """A trace anew, in the file that is there if there is one."""
    path.write_text("[\n" + text(*events), encoding="utf-8")


def append(path: Path, *events: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text(*events))
