"""Two reports side by side: what has become faster or slower, and whether they may be compared at all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm_saguaro.benchmark.records import Report, Run
from vllm_saguaro.benchmark.summary import Spread
from vllm_saguaro.benchmark.tables import render, same_text, spread

_ADDED = {"top_p": [1.0], "sweep": {}, "forecasts": False, "dataset": "prompts", "category": None}
"""Settings that older reports do not have, and what they were then."""


def ratio(first: Run, second: Run) -> Spread:
    """Speed of the second over that of the first.

    The repetitions of two files did not take turns, so nothing pairs them: the spread is the widest one possible.
    """
    a, b = (Spread.of(one.tokens_per_second for one in run.repetitions) for run in (first, second))
    return Spread(b.median / a.median, b.low / a.high, b.high / a.low)


def compare_json(first: Report, second: Report) -> dict[str, Any]:
    """The same as plain values: what differs, and each configuration that both have."""
    theirs = {run.name: run for run in second.runs}
    pairs = [(run, theirs[run.name]) for run in first.runs if run.name in theirs]
    return {
        "differs": differences(first, second),
        "configurations": [
            {
                "name": mine.name,
                "a": asdict(Spread.of(one.tokens_per_second for one in mine.repetitions)),
                "b": asdict(Spread.of(one.tokens_per_second for one in other.repetitions)),
                "ratio": asdict(ratio(mine, other)),
                "same_text": _texts(mine, other),
            }
            for mine, other in pairs
        ],
    }


def compare_text(first: Report, second: Report) -> str:
    """The table of the configurations that both have, and what differs in where they come from."""
    theirs = {run.name: run for run in second.runs}
    rows = []
    for run in first.runs:
        other = theirs.get(run.name)
        if other is None:
            continue
        speeds = (Spread.of(one.tokens_per_second for one in both.repetitions) for both in (run, other))
        rows.append((run.name, *(spread(speed, 1) for speed in speeds), spread(ratio(run, other)), _texts(run, other)))
    lines = [f"differs: {difference}" for difference in differences(first, second)]
    if not rows:
        return "\n".join([*lines, "no configuration is in both files"])
    return "\n".join([*lines, render(("configuration", "A tokens/s", "B tokens/s", "B / A", "same text"), rows)])


def _texts(first: Run, second: Run) -> str:
    """Only greedy texts of the same prompts can be expected to be equal."""
    a, b = first.repetitions[0].digests, second.repetitions[0].digests
    if first.workload.temperature > 0 or len(a) != len(b):
        return same_text(None)
    return same_text([sum(mine == other for mine, other in zip(a, b, strict=True)), len(a)])


def differences(first: Report, second: Report) -> list[str]:
    """Settings, versions, revision and processor that are not the same in both."""
    found = []
    mine, theirs = (_ADDED | report.settings for report in (first, second))
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a != b:
            found.append(f"{name}: {a} / {b}")
    for name in ("git", "versions", "processor", "cores_used"):
        a, b = first.provenance.get(name), second.provenance.get(name)
        if a != b:
            found.append(f"{name}: {a} / {b}")
    return found
