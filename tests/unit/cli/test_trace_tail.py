"""Reading the end of a file that somebody is writing, cutting, replacing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.cli.planted_rounds import append, instant, named, rounds, span, text, write
from vllm_saguaro.cli.trace_tail import TraceEvent, TraceFile, parse


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rounds.json"


def steps(trace: TraceFile) -> list[int]:
    return [event.arguments["step"] for event in trace.read().events if event.name == "verify"]


def test_a_file_that_is_not_there_yet_is_waited_for(path: Path) -> None:
    trace = TraceFile(path)
    tail = trace.read()
    assert (tail.events, tail.written) == ([], None)
    assert "is not there yet" in (tail.problem or "")
    write(path, named(1, "target"), *rounds(2))
    tail = trace.read()
    assert tail.problem is None
    assert tail.written == path.stat().st_mtime
    assert tail.processes == {1: "target"}
    assert steps(trace) == [1, 2]


def test_what_is_added_is_read_and_half_a_line_is_waited_for(path: Path) -> None:
    write(path, *rounds(1))
    trace = TraceFile(path)
    assert steps(trace) == [1]
    line = text(*rounds(1, first=2)[:1])
    with path.open("a") as file:
        file.write(line[:25])
        file.flush()
        assert steps(trace) == [1]
        file.write(line[25:])
    assert steps(trace) == [1, 2]
    assert steps(trace) == [1, 2], "nothing is read twice"


def test_events_are_in_order_of_their_start_whoever_wrote_first(path: Path) -> None:
    write(path, span("verify", 1, 5000.0, 10.0, step=2), span("verify", 1, 1000.0, 10.0, step=1))
    assert steps(TraceFile(path)) == [1, 2]


def test_a_file_that_was_cut_is_read_anew(path: Path) -> None:
    write(path, *rounds(5))
    trace = TraceFile(path)
    assert len(steps(trace)) == 5
    write(path, *rounds(2, first=100))
    assert steps(trace) == [100, 101]


def test_so_is_one_that_was_cut_and_is_longer_already(path: Path) -> None:
    write(path, *rounds(3))
    trace = TraceFile(path)
    assert steps(trace) == [1, 2, 3]
    before = path.stat()
    write(path, *rounds(7, first=50))
    assert path.stat().st_size > before.st_size
    assert path.stat().st_ino == before.st_ino
    assert steps(trace) == [50, 51, 52, 53, 54, 55, 56]


def test_so_is_another_file_under_the_name(path: Path) -> None:
    write(path, *rounds(3))
    trace = TraceFile(path)
    assert steps(trace) == [1, 2, 3]
    os.replace(path, path.with_suffix(".old"))
    assert steps(trace) == [1, 2, 3], "the old ones are shown until there is something new"
    assert "is not there yet" in (trace.read().problem or "")
    write(path, *rounds(4, first=10))
    assert steps(trace) == [10, 11, 12, 13]


def test_of_a_long_file_only_the_end_is_read(path: Path) -> None:
    write(path, *rounds(12000))
    assert path.stat().st_size > 4 << 20
    trace = TraceFile(path)
    found = steps(trace)
    assert found[-1] == 12000
    assert found == list(range(found[0], 12001)), "no step is left out"
    assert len(trace.read().events) == 16384
    append(path, *rounds(1, begin=1e9, first=12001))
    assert steps(trace)[-1] == 12001


def test_what_is_no_regular_file_is_said_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    assert "no regular file" in (TraceFile(path).read().problem or "")


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"[", b"]", b"{", b"nothing,", b"[1, 2],", b'{"ph": "X"},'),
        b'{"name": "a", "ph": "X", "pid": 1, "ts": "x"},',
        b'{"name": "a", "ph": "X", "pid": 1, "ts": NaN, "dur": 1},',
        b'{"name": "a", "ph": "B", "pid": 1, "ts": 1},',
    ],
)
def test_what_is_no_event_is_left_out(line: bytes) -> None:
    assert parse(line) is None


def test_events_are_understood_with_and_without_length() -> None:
    found = parse(text(span("round", 3, 5.0, 2.0, step=1)).encode())
    assert found == TraceEvent("round", "draft", 3, 5.0, 2.0, {"step": 1})
    assert found.end == 7.0
    mark = parse(text(instant("draft down", 2, 9.0)).encode())
    assert mark == TraceEvent("draft down", "draft", 2, 9.0, None, {})
    assert mark.end == 9.0
    assert parse(b"[" + text(named(2, "draft 0")).encode()) == {2: "draft 0"}
