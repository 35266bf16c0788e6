"""The last rounds of a trace as bars and marks over time, and how much of the drafting lay behind target passes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from vllm_saguaro.cli.trace_tail import Tail, TraceEvent

TARGET: Final = 1
"""The process of the target; that of draft r is 2 + r."""
_FIRST_DRAFT: Final = 2
_PASSES: Final = ("verify", "forward")
_ENQUEUE: Final = "enqueue"
"""On CUDA: the host gives a step to the device, and never learns when it was computed."""
_OF_TARGET: Final = (*_PASSES, _ENQUEUE, "wait")
_OF_DRAFT: Final = ("round", "prompt")
"""What a round consists of (glue, fork, decode) lies within it, and is for a viewer with more room."""
_PAUSE: Final = 1e6
"""Microseconds without a pass after which nobody asked for anything: what was before would only squeeze the rest."""
_MOST_COUNTED: Final = 10**6
"""No step has so many outcomes: a file that says more says nonsense."""

Span = tuple[float, float]


def timeline(tail: Tail, rounds: int) -> dict[str, Any]:
    """The last `rounds` target passes and all that happened meanwhile, as plain values.

    Times are microseconds from `origin`, the start of the first pass that is shown. `hidden` of a draft round are the
    parts of it during which the target computed, in a pass before the first, too.
    """
    steps = [event for event in tail.events if _is_step(event)]
    passes = _last(steps, rounds)
    if not passes:
        nothing: dict[str, Any] = {"span": 0.0, "lanes": [], "bars": [], "outcomes": [], "marks": [], "summary": None}
        return {**nothing, "words": "no target pass in it yet"}
    origin, last = passes[0].start, max(event.end for event in passes)
    shown = [event for event in tail.events if event.end >= origin and event.start <= last and _is_shown(event)]
    outcomes = [event for event in tail.events if event.name == "outcomes" and origin <= event.start]
    shown += [event for event in outcomes if event.start > last]
    since = min(origin, *(event.start for event in shown))  # a round may have begun behind a pass before the first
    busy = merged((event.start, event.end) for event in steps if event.name in _PASSES and event.end >= since)
    bars = [_bar(event, busy, origin) for event in shown if event.length is not None]
    processes = sorted({event.process for event in shown} | {TARGET})
    marks = [event for event in shown if event.length is None and event.name != "outcomes"]
    summary = _summary(passes, shown, outcomes, busy)
    return {
        "span": max(event.end for event in shown) - origin,
        "lanes": [{"process": process, "name": tail.processes.get(process, _name(process))} for process in processes],
        "bars": bars,
        "outcomes": [{"at": event.start - origin, **_counts(event)} for event in outcomes],
        "marks": [{"at": event.start - origin, "process": event.process, "name": event.name} for event in marks],
        "summary": summary,
        "words": _words(summary),
    }


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same stretches of time in order, none of which touches another."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def common(start: float, end: float, spans: Sequence[Span]) -> list[Span]:
    """The parts of a stretch that lie in others (merged ones)."""
    cut = ((max(start, left), min(end, right)) for left, right in spans)
    return [(left, right) for left, right in cut if left < right]


def _last(passes: list[TraceEvent], rounds: int) -> list[TraceEvent]:
    """The last passes, as far back as there was no pause."""
    kept = passes[-rounds:]
    for place in range(len(kept) - 1, 0, -1):
        if kept[place].start - kept[place - 1].end > _PAUSE:
            return kept[place:]
    return kept


def _is_step(event: TraceEvent) -> bool:
    return event.process == TARGET and event.name in (*_PASSES, _ENQUEUE) and event.length is not None


def _is_round(event: TraceEvent) -> bool:
    return event.process >= _FIRST_DRAFT and event.name == "round" and event.length is not None


def _is_shown(event: TraceEvent) -> bool:
    return event.length is None or event.name in (_OF_TARGET if event.process == TARGET else _OF_DRAFT)


def _name(process: int) -> str:
    return "target" if process == TARGET else f"draft {process - _FIRST_DRAFT}"


def _bar(event: TraceEvent, busy: Sequence[Span], origin: float) -> dict[str, Any]:
    hidden = common(event.start, event.end, busy) if event.process != TARGET else []
    said = ((key, event.arguments.get(key)) for key in ("step", "rows", "branches", "tokens", "why"))
    return {
        "process": event.process,
        "name": event.name,
        "start": event.start - origin,
        "length": event.length,
        "hidden": [(start - origin, end - origin) for start, end in hidden],
        **{key: value for key, value in said if isinstance(value, str) or _is_number(value)},
    }


def _counts(event: TraceEvent) -> dict[str, int]:
    keys = ("hits", "not_predicted", "late", "absent", "accepted", "backups")
    return {"step": _whole(event, "step"), **{key: _count(event, key) for key in keys}}


def _count(event: TraceEvent, key: str) -> int:
    return min(_MOST_COUNTED, _whole(event, key))


def _whole(event: TraceEvent, key: str) -> int:
    value = event.arguments.get(key, 0)
    return max(0, int(value)) if _is_number(value) else 0


def _is_number(value: object) -> bool:
    """Python's JSON has NaN, Infinity and integers beyond any float, too; nobody can draw them."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _summary(
    passes: Sequence[TraceEvent], shown: Sequence[TraceEvent], outcomes: Sequence[TraceEvent], busy: Sequence[Span]
) -> dict[str, Any]:
    """Counts, and times in microseconds: `hidden` of `drafting` lay behind passes, `waited` is the target's waiting.

    `seen`: whether the trace has when the target computed at all.
    """
    rounds = [event for event in shown if _is_round(event)]
    hidden = sum(end - start for event in rounds for start, end in common(event.start, event.end, busy))
    misses = sum(_count(event, cause) for event in outcomes for cause in ("not_predicted", "late", "absent"))
    return {
        "passes": len(passes),
        "seen": any(event.name in _PASSES for event in passes),
        "took": max(event.end for event in passes) - passes[0].start,
        "rounds": len(rounds),
        "hits": sum(_count(event, "hits") for event in outcomes),
        "misses": misses,
        "drafting": sum(event.length or 0.0 for event in rounds),
        "hidden": hidden,
        "waited": sum(event.length or 0.0 for event in shown if event.name == "wait" and event.process == TARGET),
    }


def _words(summary: dict[str, Any]) -> str:
    """The same for a person: one line."""
    took = summary["took"]
    named = (("hits", "hit"), ("misses", "miss"), ("rounds", "draft round"))
    hits, misses, rounds = (_number_of(summary[key], name) for key, name in named)
    passes = _number_of(summary["passes"], "target pass" if summary["seen"] else "step given to the device")
    line = f"{passes} in {took / 1e3:.1f} ms, {hits}, {misses}."
    if not summary["seen"]:
        line += f" When the device computed is not in the trace; {rounds}."
    elif summary["rounds"] and summary["drafting"]:
        line += f" {summary['hidden'] / summary['drafting']:.0%} of {rounds} lay behind target passes."
    if took:
        line += f" The target waited {summary['waited'] / 1e3:.2f} ms ({summary['waited'] / took:.1%} of the time)."
    return line


def _number_of(count: int, name: str) -> str:
    first, _, rest = name.partition(" given")
    many = "" if count == 1 else "es" if first.endswith("ss") else "s"
    return f"{count} {first}{many}{' given' if rest else ''}{rest}"
