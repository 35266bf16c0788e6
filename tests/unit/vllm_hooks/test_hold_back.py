"""Memory held back from the target's KV for the draft's rounds; against stand-ins for CUDA's accounting."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.unit.drafting.device_driver import World
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.drafting.device_model import DecodeRows, Piece
from vllm_saguaro.drafting.slot_state import SlotState
from vllm_saguaro.messages import Sampling
from vllm_saguaro.placement.side_stream import InlineStream
from vllm_saguaro.placement.stream import StreamDraft

PROMPT = [(7 * i + 3) % 40 for i in range(11)]
A_ROW, A_TOKEN, A_WORKSPACE = 10, 30, 7
"""Bytes that a forward takes for a while, by rows or by tokens of a prompt; and those that the first one keeps."""


class Accounting:
    """What torch says of a GPU's memory. `done` has the calls in their order, and the forwards between them."""

    def __init__(self) -> None:
        self.allocated = self.peak = 1000
        self.done: list[str] = []

    def forward(self, name: str, size: int) -> None:
        kept = 0 if any(each.startswith(("decode", "read")) for each in self.done) else A_WORKSPACE
        self.allocated += kept
        self.peak = max(self.peak, self.allocated + size)
        self.done.append(name)

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.peak = self.allocated
        self.done.append("reset")

    @contextlib.contextmanager
    def in_place_of_cudas(self) -> Iterator[None]:
        said: dict[str, Any] = {
            "synchronize": lambda device: self.done.append("synchronised"),
            "reset_peak_memory_stats": self.reset_peak_memory_stats,
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "empty_cache": lambda: self.done.append("cache emptied"),
        }
        empty = torch.empty

        def noted(*shape: Any, **named: Any) -> Tensor:
            if named.get("dtype") == torch.uint8:
                self.done.append("held")
            return empty(*shape, **named)

        with mock.patch.multiple(torch.cuda, **said), mock.patch.object(torch, "empty", noted):
            yield


class Hungry(FakeDeviceModel):
    """Takes memory, by an accounting that is attached for a while."""

    accounting: Accounting | None = None

    def decode(self, rows: DecodeRows) -> Tensor:
        if self.accounting is not None:
            count = rows.input_ids.shape[0]
            self.accounting.forward(f"decode {count}", count * A_ROW)
        return super().decode(rows)

    def read(self, piece: Piece) -> None:
        if self.accounting is not None:
            count = piece.token_ids.shape[0]
            self.accounting.forward(f"read {count}", count * A_TOKEN)
        super().read(piece)


def slots_of(state: SlotState) -> dict[str, Tensor]:
    """All that is known of the slots, without the row that is nobody's."""
    return {name: getattr(state, name)[: state.nobody].clone() for name in state.__slots__}


def held_back(model: Hungry, world: World) -> tuple[Any, list[str]]:
    from vllm_saguaro.vllm_hooks.stream_draft import _hold_back

    stream = InlineStream()
    stream.cuda = mock.Mock()
    accounting = model.accounting = Accounting()
    with accounting.in_place_of_cudas():
        let_go = _hold_back(world.engine, stream)
    model.accounting = None
    return let_go, accounting.done


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(512, 64 * A_TOKEN), (16, 16 * A_TOKEN), (2, 12 * A_ROW)],
    ids=["the longest text", "the longest piece of it", "the largest round"],
)
def test_the_most_that_any_work_takes_for_a_while_is_held(max_tokens: int, expected: int) -> None:
    model = Hungry(max_tokens=max_tokens, max_length=64)
    let_go, done = held_back(model, World(model, slots=3, branches=4))
    (held,) = let_go.__self__
    assert held.nbytes == expected, "neither less, nor what stays anyway"
    rounds = [each for batch in (3, 2, 1) for each in (f"decode {batch}", *[f"decode {4 * batch}"] * 3)]
    assert done == [
        *("synchronised", "reset", *rounds, "synchronised"),
        *("synchronised", "reset", f"read {min(max_tokens, 64)}", "synchronised"),
        *("cache emptied", "held"),  # emptied first: what was taken must not be counted twice
    ]


def test_the_largest_round_is_the_one_with_the_most_rows() -> None:
    """With 20 requests that is not the one of all: 16 have 16 branches each, 20 have 12."""
    model = Hungry(max_tokens=2, num_blocks=1024)
    let_go, done = held_back(model, World(model, slots=20, branches=20))
    (held,) = let_go.__self__
    assert held.nbytes == 256 * A_ROW
    rows = [int(each.split()[1]) for each in done if each.startswith("decode")]
    assert rows[0] == 16
    assert rows[1] == max(rows) == 256, "first, before anything that a graph will hold is made for fewer rows"


def test_graphs_keep_a_round_and_prompts_are_read_beside_it() -> None:
    from vllm_saguaro.vllm_hooks.stream_draft import A_FORWARD_IN_A_GRAPH, A_GRAPH

    model = Hungry(max_length=64)
    model.captures = True
    let_go, _ = held_back(model, World(model, slots=3, branches=4))
    (held,) = let_go.__self__
    graphs = 3 * (2 * A_GRAPH + 4 * A_FORWARD_IN_A_GRAPH)  # three batches, three drafts and the token that is glued
    assert held.nbytes == 12 * A_ROW + 64 * A_TOKEN + graphs


def test_it_leaves_every_slot_as_it_was_and_the_draft_drafts() -> None:
    model = Hungry()
    world = World(model, slots=3)
    before = slots_of(world.engine.state)
    held_back(model, world)
    after = slots_of(world.engine.state)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    for _ in range(3):
        assert world.step({0: world.table(0)[0][0]}).hits == [True]


def test_it_is_let_go_before_the_first_request() -> None:
    model = Hungry()
    world = World(model, slots=3)
    let_go, _ = held_back(model, world)
    held = weakref.ref(let_go.__self__[0])
    world.draft = StreamDraft(world.engine, InlineStream(), let_go)
    assert held() is not None
    admit, there = world.engine.admit, []

    def looks_first(*told: Any) -> None:
        there.append(held() is not None)
        admit(*told)

    with mock.patch.object(world.engine, "admit", looks_first):
        world.admit(0, PROMPT)
        world.admit(1, PROMPT)
    assert there == [False, False]


@pytest.mark.parametrize(("slots", "branches", "most"), [(3, 4, 12), (20, 20, 256)])
def test_on_a_gpu_it_is_held_on_the_drafts_stream_once_all_else_is_there(
    slots: int, branches: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make_stream_draft` does, and what the draft that it makes does with what is held."""
    from vllm_saguaro.vllm_hooks import stream_draft
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig

    done: list[str] = []

    class Stream(InlineStream):
        @contextlib.contextmanager
        def entered(self) -> Iterator[None]:
            done.append("(")
            yield
            done.append(")")

    class Loaded(FakeDeviceModel):
        def __init__(self, config: DraftModelConfig) -> None:
            super().__init__()
            assert config.max_rows == most
            done.append("loaded")

        def warm_up(self, rows: Any) -> None:
            done.append(f"warm for {rows[-1]} rows")

    def hold_back(engine: Any, stream: Any) -> Any:
        assert engine.round.resident_bytes > 0
        done.append("held")
        return lambda: done.append("let go")

    from vllm_saguaro.kernels.operations import TWINS

    for name, stand_in in {
        "side_stream": lambda device: Stream(),
        "VllmDeviceModel": Loaded,
        "operations_for": lambda device: TWINS,
        "_hold_back": hold_back,
    }.items():
        monkeypatch.setattr(stream_draft, name, stand_in)
    config = DraftModelConfig(model="d", max_length=64, max_rows=1, kv_cache_bytes=1 << 20, device="cuda:0")
    draft = stream_draft.make_stream_draft(stream_draft.StreamOptions(config, slots, 3, branches=branches))
    assert done == ["(", "loaded", f"warm for {most} rows", "held", ")"]
    done.clear()
    for slot in (0, 1):
        draft.admit(slot, f"request {slot}", PROMPT, Sampling())
    assert done[:2] == ["let go", "("]
    assert done.count("let go") == 1
