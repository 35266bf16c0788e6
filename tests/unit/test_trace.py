"""What a trace says of the rounds, and that nothing which goes wrong with it reaches the target's thread."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.speculator_bench import PROMPT, Bench, K, admitted
from tests.unit.test_going_quiet import Scripted
from vllm_saguaro import counters, trace
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Miss, Round, Work
from vllm_saguaro.placement.channel import Traced
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.trace import Trace, WrittenTrace
from vllm_saguaro.trace_file import TraceFile

LOG = logging.getLogger("saguaro-test")
Json = dict[str, Any]


class Side:
    """A draft side that says what it is given to say."""

    def __init__(self) -> None:
        self.said: list[Round] = []

    def rounds(self) -> Sequence[Round]:
        found, self.said = self.said, []
        return found


class Traces:
    """Makes traces, and reads them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.json"
        self.made: list[WrittenTrace] = []

    def of(self, page: CounterPage, drafts: int = 1) -> WrittenTrace:
        self.made.append(WrittenTrace(TraceFile(str(self.path)), drafts, page, LOG))
        return self.made[-1]

    def of_bench(self, bench: Bench) -> WrittenTrace:
        """One that a bench's speculator tells."""
        made = self.of(bench.page)
        bench.speculator = Speculator(bench.channel, K, bench.page, LOG, bench.policy, made)
        return made

    def read(self, *names: str) -> list[Json]:
        """The events that are there after closing, of these names (all, if none are named)."""
        for one in self.made:
            one.close()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "["
        found = [json.loads(line.removesuffix(",")) for line in lines[1:]]
        return [event for event in found if not names or event["name"] in names]


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[Traces]:
    made = Traces(tmp_path)
    yield made
    for one in made.made:
        one.close()


def at(seconds: float) -> int:
    """Nanoseconds, for a round."""
    return round(seconds * 1e9)


def without_times(event: Json) -> Json:
    return {key: value for key, value in event.items() if key not in ("ts", "dur")}


# ---- the target's side ----------------------------------------------------------------------------------------------


def test_target_and_drafts_have_names(traces: Traces) -> None:
    traces.of(CounterPage(), drafts=2)
    assert traces.read() == [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
        for pid, name in ((1, "target"), (2, "draft 0"), (3, "draft 1"))
    ]


def test_the_clock_of_both_sides_is_one() -> None:
    """`perf_counter` here, `monotonic_ns` there: the trace puts them on one axis."""
    names = {time.get_clock_info(name).implementation for name in ("perf_counter", "monotonic")}
    assert names == {"clock_gettime(CLOCK_MONOTONIC)"}


def test_a_step_is_a_pass_and_its_outcomes(traces: Traces) -> None:
    bench = Bench()
    traces.of_bench(bench)
    before = time.perf_counter()
    bench.arrive("a")
    bench.arrive("b")
    stamps = [admit.stamp for admit in admitted(bench)]
    bench.table(stamps[0], (0, 31))
    assert bench.propose(bench.row("a", 31), bench.row("b", 32)) == [[0, 1, 2], []]
    bench.speculator.begin_step([], [])
    bench.table(stamps[0].next(), (2, 40))
    bench.propose(bench.row("a", 0, 1, 40, verified=3), bench.row("b", 33))
    after = time.perf_counter()
    events = traces.read("forward", "verify", "outcomes")
    place = {"cat": "target", "pid": 1, "tid": 0}
    moment = {"name": "outcomes", "ph": "i", "s": "t", **place}
    assert list(map(without_times, events)) == [
        {"name": "forward", "ph": "X", **place, "args": {"step": 1, "rows": 2}},
        {
            **moment,
            "args": {
                **{"step": 1, "hits": 1, "not_predicted": 0, "late": 1, "absent": 0, "backups": 0},
                **{"accepted": 0, "drafts": 0},
            },
        },
        {"name": "verify", "ph": "X", **place, "args": {"step": 2, "rows": 1}},
        {
            **moment,
            "args": {
                **{"step": 2, "hits": 1, "not_predicted": 0, "late": 1, "absent": 0, "backups": 0},
                **{"accepted": 2, "drafts": 3},
            },
        },
    ]
    for forward, outcomes in (events[:2], events[2:]):
        assert forward["ts"] + forward["dur"] == pytest.approx(outcomes["ts"], abs=0.01)
        assert 1e6 * before <= forward["ts"] <= outcomes["ts"] <= 1e6 * after


def test_what_is_told_adds_up_to_the_counters(traces: Traces) -> None:
    bench = Bench(policy=Policy(K, "ngram", adaptive=False))
    traces.of_bench(bench)
    bench.arrive("a")
    bench.guesses["a"] = [8, 9]
    (stamp,) = (admit.stamp for admit in admitted(bench))
    for step in range(6):
        if step % 2:
            bench.table(stamp, (0, 31))
        bench.propose(bench.row("a", 31))
        stamp = stamp.next()
        bench.speculator.begin_step([], [])
    told = [event["args"] for event in traces.read("outcomes")]
    assert sum(args["hits"] for args in told) == bench.page.value(counters.HITS) == 3
    for cause in Miss:
        assert sum(args[cause.value] for args in told) == bench.page.value(counters.MISSES[cause])
    assert sum(args["backups"] for args in told) == bench.page.value(counters.BACKUPS["ngram"]) == 3


def test_a_wait_for_drafts_is_told(traces: Traces) -> None:
    bench = Bench(policy=Policy(K, "jit", adaptive=False))
    traces.of_bench(bench)
    bench.arrive("a")
    (stamp,) = (admit.stamp for admit in admitted(bench))
    bench.table(stamp, (0, 30))
    bench.channel.on_wants = lambda wants: bench.table(stamp, (0, 31), version=2)
    assert bench.propose(bench.row("a", 31)) == [[0, 1, 2]]
    (wait,) = traces.read("wait")
    assert without_times(wait) == {
        **{"name": "wait", "cat": "target", "ph": "X", "pid": 1, "tid": 0},
        "args": {"step": 1, "rows": 1, "why": "just in time"},
    }
    assert wait["dur"] > 0


def test_quiet_times_are_told_once_at_both_ends(traces: Traces) -> None:
    policy = Scripted()
    bench = Bench(policy=policy)
    traces.of_bench(bench)
    bench.arrive("a", PROMPT)
    policy.in_vain = True
    for _ in range(5):
        bench.propose(bench.row("a", 31))
    told = [(event["name"], event["pid"], event["ph"]) for event in traces.read("quiet", "draws")]
    assert told == [("quiet", 2, "i"), ("draws", 2, "i")]


def test_what_a_device_counts_is_told_when_it_has_come(traces: Traces) -> None:
    page = CounterPage()
    made = traces.of(page)
    made.enqueued(time.perf_counter(), 3, 2)
    made.counted()
    page.set(counters.DRAFT_UP, 1)
    page.add(counters.HITS, 2)
    page.add(counters.MISSES[Miss.NOT_PREDICTED])
    made.enqueued(time.perf_counter(), 3, 3)
    made.counted()
    made.counted()
    page.set(counters.DRAFT_UP, 0)
    made.counted()
    told = [(event["name"], event["args"]) for event in traces.read() if event["ph"] != "M"]
    assert told == [
        ("enqueue", {"step": 1, "rows": 3, "verifying": 2}),
        ("enqueue", {"step": 2, "rows": 3, "verifying": 3}),
        ("draft up", {}),
        ("outcomes", {"step": 2, "hits": 2, "not_predicted": 1, "absent": 0}),
        ("draft down", {}),
    ]


# ---- the draft's side -----------------------------------------------------------------------------------------------


def test_a_round_has_its_parts_and_the_step_that_it_is_for(traces: Traces) -> None:
    made, side = traces.of(CounterPage(), drafts=2), Side()
    made.watch(1, side)
    made.forward_began()
    made.forward_ended(time.perf_counter(), [])
    began = time.perf_counter()
    side.said = [
        Round(Work.PROMPT, 1000, 3000, 3000, 3000, 40, 0),
        Round(Work.ROUND, at(began), at(began + 1), at(began + 1), at(began + 3), 2, 12),
        Round(Work.PURSUIT, at(began + 4), at(began + 4), at(began + 5), at(began + 6), 1, 1),
    ]
    events = [event for event in traces.read() if event.get("cat") == "draft"]
    assert [(event["name"], event["args"]) for event in events] == [
        ("prompt", {"step": 1, "tokens": 40}),
        ("round", {"step": 2, "rows": 2, "branches": 12}),
        ("glue", {}),
        ("decode", {}),
        ("round", {"step": 1, "rows": 1, "branches": 1, "why": "just in time"}),
        ("fork", {}),
        ("decode", {}),
    ]
    assert {(event["pid"], event["tid"], event["ph"]) for event in events} == {(3, 0, "X")}
    assert (events[0]["ts"], events[0]["dur"]) == (1.0, 2.0)
    for outer, *parts in (events[1:4], events[4:]):
        assert outer["ts"] <= parts[0]["ts"]
        assert parts[-1]["ts"] + parts[-1]["dur"] == pytest.approx(outer["ts"] + outer["dur"], abs=0.01)


def test_a_draft_side_comes_and_goes(traces: Traces) -> None:
    made = traces.of(CounterPage(), drafts=2)
    made.draft_up(1, True)
    made.draft_up(1, False)
    assert [(event["name"], event["pid"]) for event in traces.read("draft up", "draft down")] == [
        ("draft up", 3),
        ("draft down", 3),
    ]


def test_a_channel_that_is_gone_is_not_kept(traces: Traces) -> None:
    made, side = traces.of(CounterPage()), Side()
    assert isinstance(side, Traced)
    made.watch(0, side)
    side.said = [Round(Work.PROMPT, 1000, 3000, 3000, 3000, 40, 0)]
    del side
    gc.collect()
    assert made.write()
    assert traces.read("prompt") == []


# ---- the writing ----------------------------------------------------------------------------------------------------


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_it_is_written_while_the_engine_runs(traces: Traces) -> None:
    made = traces.of(CounterPage())
    made.draft_up(0, True)
    assert until(lambda: "draft up" in traces.path.read_text(encoding="utf-8"))


def test_what_waits_is_bounded_and_what_is_lost_is_said(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_MOST_WAITING", 3)
    monkeypatch.setattr(trace, "_EVERY_SECONDS", 60.0)
    made = traces.of(CounterPage())
    for _ in range(5):
        made.draft_up(0, True)
    assert made.write()
    made.draft_up(0, False)
    told = [event["name"] for event in traces.read() if event["ph"] != "M"]
    assert told == ["draft up"] * 3 + ["lost", "draft down"]
    assert [event["args"] for event in traces.read("lost")] == [{"events": 2}]


def test_a_file_that_can_no_longer_be_written_ends_the_trace_alone(
    traces: Traces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    file = TraceFile(str(traces.path), most_bytes=200)
    made = WrittenTrace(file, 1, bench.page, LOG)
    traces.made.append(made)
    bench.speculator = Speculator(bench.channel, K, bench.page, LOG, bench.policy, made)
    bench.arrive("a")
    with caplog.at_level(logging.WARNING, LOG.name):
        for _ in range(10):
            bench.propose(bench.row("a", 31))
            made.write()
    assert [record.getMessage() for record in caplog.records] == [
        f"The trace {traces.path} ends here: it may have 200 bytes at most. The engine goes on without it."
    ]
    assert len(made._waiting) == 0
    assert [event["ph"] for event in traces.read()] == ["M", "M"]


def test_a_draft_side_that_cannot_be_asked_ends_the_trace_alone(
    traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Side):
        def rounds(self) -> Sequence[Round]:
            raise ValueError("operation forbidden")

    made, side = traces.of(CounterPage()), Broken()
    with caplog.at_level(logging.WARNING, LOG.name):
        made.watch(0, side)
        made.write()
    assert "ends here: operation forbidden." in caplog.text


def test_one_that_is_dropped_goes_with_its_thread(traces: Traces) -> None:
    made = traces.of(CounterPage())
    thread = made._thread
    traces.made.clear()
    del made
    gc.collect()
    assert until(lambda: not thread.is_alive())


def test_closing_twice_writes_once(traces: Traces) -> None:
    made = traces.of(CounterPage())
    made.draft_up(0, True)
    made.close()
    made.close()
    made.draft_up(0, False)
    assert [event["name"] for event in traces.read() if event["ph"] != "M"] == ["draft up"]
    assert made._thread not in threading.enumerate()


def test_without_a_trace_nothing_is_kept() -> None:
    none = Trace()
    bench = Bench()
    assert type(bench.speculator._trace) is Trace
    bench.arrive("a")
    bench.propose(bench.row("a", 31))
    for act in (none.forward_began, none.counted, none.close):
        act()
    none.watch(0, Side())
    assert vars(none) == vars(bench.speculator._trace) == {}
