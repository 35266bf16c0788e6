"""The last rounds of a trace whose times are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.planted_rounds import instant, named, outcomes, rounds, span, write
from vllm_saguaro.cli.timeline import common, merged, timeline
from vllm_saguaro.cli.trace_tail import TraceFile


def shown(tmp_path: Path, *events: dict[str, Any], last: int = 24) -> dict[str, Any]:
    write(tmp_path / "rounds.json", *events)
    return timeline(TraceFile(tmp_path / "rounds.json").read(), last)


def test_bars_lie_where_the_trace_has_them(tmp_path: Path) -> None:
    found = shown(tmp_path, named(1, "target"), *rounds(3))
    assert found["lanes"] == [{"process": 1, "name": "target"}, {"process": 2, "name": "draft 0"}]
    passes = [bar for bar in found["bars"] if bar["name"] == "verify"]
    assert [(bar["start"], bar["length"], bar["step"]) for bar in passes] == [(1e4 * n, 8e3, n + 1) for n in range(3)]
    drafting = [bar for bar in found["bars"] if bar["name"] == "round"]
    assert [(bar["start"], bar["length"], bar["branches"]) for bar in drafting] == [
        (1e3, 6e3, 12),
        (11e3, 6e3, 12),
        (21e3, 8e3, 12),
    ]
    assert [bar["hidden"] for bar in drafting] == [[(1e3, 7e3)], [(11e3, 17e3)], [(21e3, 28e3)]]
    assert found["span"] == 29e3


def test_hits_and_misses_are_marked_and_counted(tmp_path: Path) -> None:
    found = shown(tmp_path, *rounds(3))
    assert [(mark["at"], mark["step"], mark["hits"], mark["late"]) for mark in found["outcomes"]] == [
        (8e3, 1, 1, 0),
        (18e3, 2, 1, 0),
        (28e3, 3, 0, 1),
    ]
    summary = found["summary"]
    assert (summary["passes"], summary["rounds"], summary["hits"], summary["misses"]) == (3, 3, 2, 1)
    assert (summary["took"], summary["drafting"], summary["hidden"], summary["waited"]) == (28e3, 20e3, 19e3, 3e3)
    assert found["words"] == (
        "3 target passes in 28.0 ms, 2 hits, 1 miss. 95% of 3 draft rounds lay behind target passes. "
        "The target waited 3.00 ms (10.7% of the time)."
    )


def test_only_the_last_rounds_are_shown(tmp_path: Path) -> None:
    found = shown(tmp_path, *rounds(10), last=2)
    assert [bar["step"] for bar in found["bars"] if bar["name"] == "verify"] == [9, 10]
    assert min(bar["start"] for bar in found["bars"] if bar["name"] == "verify") == 0


def test_a_round_that_began_behind_the_pass_before_the_first_one_is_hidden_by_it(tmp_path: Path) -> None:
    events = [
        span("verify", 1, 0.0, 8e3, step=1),
        span("round", 2, 6e3, 6e3, step=1),
        span("verify", 1, 10e3, 8e3, step=2),
    ]
    found = shown(tmp_path, *events, last=1)
    (drafting,) = [bar for bar in found["bars"] if bar["name"] == "round"]
    assert (drafting["start"], drafting["hidden"]) == (-4e3, [(-4e3, -2e3), (0.0, 2e3)])
    assert (found["summary"]["passes"], found["summary"]["drafting"], found["summary"]["hidden"]) == (1, 6e3, 4e3)
    assert "67% of 1 draft round lay behind target passes" in found["words"]


def test_a_pause_ends_the_view_backwards(tmp_path: Path) -> None:
    found = shown(tmp_path, *rounds(5), *rounds(2, begin=60e6, first=6))
    assert [bar["step"] for bar in found["bars"] if bar["name"] == "verify"] == [6, 7]
    assert found["span"] < 1e5


def test_every_draft_has_a_lane_and_what_happened_to_it_a_mark(tmp_path: Path) -> None:
    events = [
        span("forward", 1, 100.0, 50.0, step=1),
        span("round", 4, 120.0, 100.0, step=1),
        instant("quiet", 1, 140.0),
    ]
    found = shown(tmp_path, *events, instant("draft down", 2, 130.0), named(4, "the third"))
    assert [lane["name"] for lane in found["lanes"]] == ["target", "draft 0", "the third"]
    assert [(mark["name"], mark["at"], mark["process"]) for mark in found["marks"]] == [
        ("draft down", 30.0, 2),
        ("quiet", 40.0, 1),
    ]
    (drafting,) = [bar for bar in found["bars"] if bar["name"] == "round"]
    assert drafting["hidden"] == [(20.0, 50.0)]


def test_parts_of_a_round_are_no_rounds_and_prompts_are_bars_beside_them(tmp_path: Path) -> None:
    parts = [span("glue", 2, 1e6 + 1000, 1000.0), span("decode", 2, 1e6 + 2000, 5000.0)]
    found = shown(tmp_path, *rounds(1), *parts, span("prompt", 2, 1e6 + 7500, 100.0, step=1, tokens=9))
    assert [bar["name"] for bar in found["bars"]] == ["verify", "round", "prompt", "wait"]
    assert (found["summary"]["rounds"], found["summary"]["drafting"], found["summary"]["hidden"]) == (1, 6e3, 6e3)
    assert found["bars"][2]["tokens"] == 9


def test_what_is_only_given_to_a_device_hides_nothing(tmp_path: Path) -> None:
    steps = [span("enqueue", 1, 1e4 * step, 2e3, step=step, rows=1) for step in range(3)]
    found = shown(tmp_path, *steps, span("round", 2, 11e3, 500.0, step=1, rows=1, branches=4))
    assert [bar["hidden"] for bar in found["bars"] if bar["name"] == "round"] == [[]]
    assert found["words"] == (
        "3 steps given to the device in 22.0 ms, 0 hits, 0 misses. When the device computed is not in the trace; "
        "1 draft round. The target waited 0.00 ms (0.0% of the time)."
    )


@pytest.mark.parametrize(
    ("said", "counted"),
    [(math.nan, 0), (math.inf, 0), (10**400, 0), (-7, 0), (10**12, 10**6), ("many", 0), (2.0, 2)],
    ids=lambda value: str(value)[:9],
)
def test_counts_that_cannot_be_do_no_harm(said: object, counted: int, tmp_path: Path) -> None:
    found = shown(tmp_path, span("verify", 1, 0.0, 5.0, step=1), outcomes(5.0, 2 * 10**6, hits=said, late=said))
    assert [mark["step"] for mark in found["outcomes"]] == [2 * 10**6], "a server may be up for long"
    assert [(mark["hits"], mark["late"]) for mark in found["outcomes"]] == [(counted, counted)]
    assert (found["summary"]["hits"], found["summary"]["misses"]) == (counted, counted)


def test_a_bar_says_only_what_a_browser_can_read(tmp_path: Path) -> None:
    odd = {"rows": math.nan, "tokens": math.inf, "branches": 10**400, "why": ["a", "list"]}
    beyond = [span("verify", 1, at, 5.0, step=9) for at in (-1.7e308, 1.7e308)]
    found = shown(tmp_path, span("verify", 1, 0.0, 5.0, step=1, **odd), *beyond)
    assert [bar.keys() & {"step", *odd} for bar in found["bars"]] == [{"step"}]
    json.dumps(found, allow_nan=False)


def test_without_a_pass_there_is_nothing_to_show(tmp_path: Path) -> None:
    found = shown(tmp_path, span("round", 2, 0.0, 5.0), outcomes(3.0, 1, hits=1))
    assert (found["bars"], found["outcomes"], found["summary"]) == ([], [], None)
    assert "no target pass" in found["words"]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([(5, 6), (0, 2), (1, 3)], [(0, 3), (5, 6)]),
        ([(0, 9), (1, 2)], [(0, 9)]),
        ([(0, 1), (1, 2)], [(0, 2)]),
    ],
)
def test_spans_that_touch_become_one(spans: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert merged(spans) == expected


def test_what_lies_in_several_spans_is_cut_into_pieces() -> None:
    assert common(1, 8, [(0, 2), (3, 4), (7, 9), (10, 11)]) == [(1, 2), (3, 4), (7, 8)]
    assert common(5, 6, [(0, 5), (6, 7)]) == []
