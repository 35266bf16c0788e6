"""The stream placement: the order of a step, and what is left when the draft fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.unit.drafting.device_driver import World
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.side_stream import CudaSideStream, InlineStream, side_stream
from vllm_saguaro.placement.stream import StreamDraft

PROMPT = [(7 * i + 3) % 40 for i in range(11)]


class Recorded(InlineStream):
    """Notes what is asked of a stream."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def follow(self) -> None:
        self._done.append("follow")

    def lead(self) -> None:
        self._done.append("lead")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self._done.append("(")
        yield
        self._done.append(")")

    def wait(self) -> None:
        self._done.append("wait")


def recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamDraft, list[str]]:
    done: list[str] = []
    for name in ("admit", "take_in", "look_up", "make_room", "work", "read_on"):
        method = getattr(DeviceEngine, name)

        def noted(self: DeviceEngine, *rest: Any, _method: Any = method, _name: str = name) -> Any:
            done.append(_name)
            return _method(self, *rest)

        monkeypatch.setattr(DeviceEngine, name, noted)
    world.draft = StreamDraft(
        world.engine, Recorded(done), lambda: done.append("first use"), lambda: done.append("gave up")
    )
    return world.draft, done


def test_the_target_waits_for_the_look_up_and_not_for_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(FakeDeviceModel())
    draft, done = recorded(world, monkeypatch)
    world.admit(0, PROMPT)
    world.admit(1, PROMPT)
    assert done == ["first use", "(", "admit", ")", "(", "admit", ")"]
    done.clear()
    world.step({0: (0, 5)})
    assert done == ["follow", "(", "take_in", "look_up", ")", "lead", "(", "make_room", "work", "read_on", ")"]
    done.clear()
    draft.capture()
    assert done == []  # nothing to capture here
    draft.close()
    assert done == ["wait"]
    assert world.model.closed


@pytest.mark.parametrize("broken", ["take_in", "look_up", "make_room", "work", "read_on"])
def test_a_draft_that_fails_leaves_filler_and_the_order_of_the_streams(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(FakeDeviceModel())
    draft, done = recorded(world, monkeypatch)
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    monkeypatch.setattr(DeviceEngine, broken, mock.Mock(side_effect=RuntimeError("planted")))
    logits = torch.full((4, 3, 40), 7.0)
    done.clear()
    for _ in range(2):
        outcomes = world.outcomes({0: (0, 6)})
        drafts = draft.exchange(outcomes)
        draft.logits_into(outcomes, drafts, logits)
        assert drafts.tokens.tolist() == [[6, 6, 6]]
        assert drafts.ready.tolist() == [0]
        assert (drafts.tokens.dtype, drafts.ready.dtype) == (torch.int64, torch.int32)
    assert done.count("follow") == 1
    assert "lead" in done[done.index("follow") :]
    assert done.count("gave up") == 1
    assert (logits == 7).all()
    assert not draft.alive
    draft.admit(1, "another", PROMPT, Sampling())
    draft.release(1, "another")


def test_a_prompt_that_cannot_be_read_ends_the_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(FakeDeviceModel())
    monkeypatch.setattr(FakeDeviceModel, "read", mock.Mock(side_effect=RuntimeError("planted")))
    world.draft.admit(0, "request", PROMPT, Sampling())
    assert not world.draft.alive


def test_a_row_without_a_token_gets_a_valid_filler_from_a_draft_that_failed() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.draft.alive = False
    outcomes = world.outcomes({0: None})
    outcomes.bonus.fill_(-1)
    assert world.draft.exchange(outcomes).tokens.tolist() == [[0, 0, 0]]


def test_c_is_the_one_that_was_given_unless_nothing_is_drawn() -> None:
    draft = World(FakeDeviceModel(), sampling_c=0.3).draft
    assert draft.sampling_c == 0.3
    draft.alive = False
    assert draft.sampling_c is None
    assert World(FakeDeviceModel(), method="greedy", sampling_c=0.3).draft.sampling_c is None


def test_everything_that_is_held_is_counted() -> None:
    small, large = World(FakeDeviceModel(), branches=2), World(FakeDeviceModel(), branches=20)
    assert 0 < small.draft.resident_bytes < large.draft.resident_bytes
    state = large.engine.state
    assert large.draft.resident_bytes > state.hidden.nbytes + state.log_q.nbytes


def test_on_a_cpu_nothing_is_under_way() -> None:
    stream = side_stream(torch.device("cpu"))
    assert isinstance(stream, InlineStream)
    assert stream.cuda is None
    assert stream.mark().reached()


def test_a_graph_is_captured_for_each_batch_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins for CUDA: a graph that is replayed makes the calls that were captured."""

    class Graph:
        def __init__(self) -> None:
            self.calls: list[Any] = []
            self.replays = 0

        def replay(self) -> None:
            self.replays += 1
            self.calls[-1]()

    made: list[Graph] = []
    capturing: list[Graph] = []

    @contextlib.contextmanager
    def captured(graph: Graph, **_: Any) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.clear()

    monkeypatch.setattr(FakeDeviceModel, "captures", True)
    monkeypatch.setattr(FakeDeviceModel, "prepare", lambda self, rows: None)
    world = World(FakeDeviceModel(), slots=4)
    stream = InlineStream()
    monkeypatch.setattr(stream, "cuda", mock.Mock())
    world.draft = StreamDraft(world.engine, stream)

    def new_graph() -> Graph:
        made.append(Graph())
        return made[-1]

    calls = {name: getattr(DeviceEngine, name) for name in ("look_up", "work")}
    for name, method in calls.items():

        def noted(self: DeviceEngine, bucket: Any, _method: Any = method) -> None:
            for graph in capturing:
                graph.calls.append(lambda: _method(self, bucket))
            _method(self, bucket)

        monkeypatch.setattr(DeviceEngine, name, noted)
    cuda: dict[str, Any] = {
        "graph_pool_handle": lambda: (0, 1),
        "stream": lambda s: contextlib.nullcontext(),
        "current_stream": lambda device: mock.Mock(),
        "CUDAGraph": new_graph,
        "graph": captured,
    }
    with mock.patch.multiple(torch.cuda, **cuda):
        world.draft.capture()
        world.draft.capture()
    assert len(made) == 2 * len(world.engine.buckets)
    world.admit(0, PROMPT)
    world.admit(1, PROMPT[:4])
    world.step({0: (0, 5), 1: (0, 6)})
    for _ in range(3):
        assert world.step({slot: world.table(slot)[0][0] for slot in (1, 0)}).hits == [True, True]
    assert sorted(graph.replays for graph in made) == [0, 0, 0, 0, 4, 4]


def test_scratch_that_a_graph_writes_to_does_not_grow_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's scratch is exchanged for a larger one by a forward with more rows than any before."""
    monkeypatch.setattr(FakeDeviceModel, "captures", True)
    world = World(FakeDeviceModel(), slots=20, branches=20)
    stream = InlineStream()
    monkeypatch.setattr(stream, "cuda", mock.Mock())
    draft = StreamDraft(world.engine, stream)
    captured: list[Any] = []
    monkeypatch.setattr(draft._calls, "capture", lambda name, *rest: captured.append(name))
    cuda: dict[str, Any] = {
        "stream": lambda s: contextlib.nullcontext(),
        "current_stream": lambda device: mock.Mock(),
    }
    with mock.patch.multiple(torch.cuda, **cuda):
        draft.capture()
    rows = [bucket.rows for what, bucket in captured if what == "work"]
    assert rows == [256, 240, 160, 80, 40, 20]
    assert [what for what, _ in captured] == ["look up", "work"] * 6


def test_cuda_events_go_from_the_target_to_the_draft_and_back() -> None:
    """Against stand-ins for CUDA: which stream records, and which waits."""
    done: list[tuple[str, str]] = []

    class Event:
        def record(self, stream: Any) -> None:
            self.by = stream.name
            done.append(("record", stream.name))

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, name: str = "draft") -> None:
            self.name, self.priority = name, priority

        def wait_event(self, event: Event) -> None:
            done.append((self.name, f"waits for {event.by}"))

    target = Stream(name="target")
    with mock.patch.multiple(torch.cuda, Stream=Stream, Event=Event, current_stream=lambda device: target):
        stream = CudaSideStream(torch.device("cuda:0"))
        stream.follow()
        assert done == [("record", "target"), ("draft", "waits for target")]
        done.clear()
        stream.lead()
        assert done == [("record", "draft"), ("target", "waits for draft")]
