"""Nothing in a step is read on the host, or copied from it with a wait: what would wait for a GPU raises here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.drafting.device_driver import World
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from tests.v2.sync_guard import SyncGuard, Synchronised, no_sync
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.drafting.device_engine import DeviceEngine
from vllm_saguaro.drafting.device_model import DecodeRows, Piece
from vllm_saguaro.messages import Noise, Sampling

PROMPT = [(7 * i + 3) % 40 for i in range(11)]
METHODS = pytest.mark.parametrize("method", ["coupled", "probabilistic", "greedy"])
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")


class Waited(AssertionError):
    """The host would have waited."""


class NoWaiting(TorchDispatchMode):
    """Operators whose result depends on what is in a tensor end the test, unless the model itself is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.copies: SyncGuard | None = None
        """Guards nothing against reads, and everything against copies from the host."""
        self.operators = 0

    def pause(self, paused: bool) -> None:
        self.paused = paused
        if self.copies is not None:
            self.copies.paused = paused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if not self.paused and func.overloadpacket.__name__ in WAITS:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class OnDevice(FakeDeviceModel):
    """Its own arithmetic is not the engine's business."""

    guard: NoWaiting | None = None

    def decode(self, rows: DecodeRows) -> Tensor:
        with self._outside():
            return super().decode(rows)

    def read(self, piece: Piece) -> None:
        with self._outside():
            super().read(piece)

    def logits(self, hidden: Tensor) -> Tensor:
        with self._outside():
            return super().logits(hidden)

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        if self.guard is None:
            yield
            return
        self.guard.pause(True)
        try:
            yield
        finally:
            self.guard.pause(False)


@contextlib.contextmanager
def no_waiting(model: OnDevice) -> Iterator[NoWaiting]:
    guard = NoWaiting()
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            method = getattr(Tensor, name)

            def refused(self: Tensor, *rest: Any, _method: Any = method, _name: str = name, **named: Any) -> Any:
                if not guard.paused:
                    raise Waited(_name)
                return _method(self, *rest, **named)

            patch.setattr(Tensor, name, refused)
        model.guard = guard
        try:
            with guard, no_sync([]) as guard.copies:
                yield guard
        finally:
            model.guard = None


def driven(model: OnDevice, method: str = "probabilistic") -> World:
    world = World(model, slots=3, sampling_c=0.5, method=method)
    world.admit(0, PROMPT)
    noise = Noise.POSITION if method == "coupled" else Noise.UNKNOWN
    world.admit(1, PROMPT[:6], Sampling(temperature=0.8, top_p=0.9, noise=noise, seed=5))
    world.step({0: (0, 5)})
    return world


def whole_step(world: World, outcomes: DeviceOutcomes) -> DeviceDrafts:
    """All that a step may ask of a draft."""
    drafts = world.draft.exchange(outcomes)
    world.draft.logits_into(outcomes, drafts, torch.zeros(3, 3, 40) if world.engine.sampling_c else None)
    world.draft.admit(2, "late", PROMPT, Sampling(temperature=1.0))
    world.draft.release(1, world.requests[1].name)
    return drafts


@METHODS
def test_admitting_and_exchanging_wait_for_nothing(method: str) -> None:
    model = OnDevice(max_tokens=16)
    world = driven(model, method)
    hit = world.table(0)[0][0]
    outcomes = world.outcomes({0: hit, 1: (0, 3)})
    with no_waiting(model) as guard:
        drafts = whole_step(world, outcomes)
    assert world.draft.alive
    assert guard.operators > 100
    assert drafts.ready.tolist() == [3, 0]


def test_a_read_on_the_host_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnDevice()
    world = driven(model)
    outcomes = world.outcomes({0: (0, 3)})
    make_room = DeviceEngine.make_room

    def reading(self: DeviceEngine, told: Any) -> None:
        told.accepted.tolist()
        make_room(self, told)

    monkeypatch.setattr(DeviceEngine, "make_room", reading)
    with no_waiting(model):
        world.draft.exchange(outcomes)
    assert not world.draft.alive


def number_at_places(engine: DeviceEngine) -> None:
    engine.state.depth[torch.arange(2)] = 0


def values_for_the_device(engine: DeviceEngine) -> None:
    torch.tensor([1, 2], device=engine.model.device)


def array_sent(engine: DeviceEngine) -> None:
    torch.from_numpy(np.arange(3)).to(engine.model.device)


@pytest.mark.parametrize("wait", [number_at_places, values_for_the_device, array_sent])
@pytest.mark.parametrize(
    "step", ["admit", "release", "take_in", "look_up", "make_room", "work", "read_on", "logits_into"]
)
def test_a_copy_from_the_host_would_be_noticed(step: str, wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnDevice()
    world = driven(model)
    outcomes = world.outcomes({0: (0, 3)})
    method = getattr(DeviceEngine, step)

    def copying(self: DeviceEngine, *told: Any) -> Any:
        wait(self)
        return method(self, *told)

    monkeypatch.setattr(DeviceEngine, step, copying)
    with pytest.raises(Synchronised), no_waiting(model):
        whole_step(world, outcomes)


@METHODS
def test_shapes_of_a_round_do_not_depend_on_what_is_found(method: str) -> None:
    """The same operators, in the same order, on the same shapes: what a CUDA graph needs."""

    class Shapes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            shape = tuple(result.shape) if isinstance(result, Tensor) else None
            self.seen.append((str(func), shape))
            return result

    world = driven(OnDevice(), method)
    bucket = world.engine.bucket(2)
    world.draft.exchange(world.outcomes({0: None, 1: None}))  # the bucket's buffers are made
    seen = []
    for found in ({0: world.table(0)[0][0], 1: (0, 3)}, {0: None, 1: (0, 9)}, {1: None, 0: None}):
        world.engine.take_in(world.outcomes(found), bucket)
        with Shapes() as shapes:
            world.engine.look_up(bucket)
            world.engine.work(bucket)
        seen.append(shapes.seen)
    assert len(seen[0]) > 200
    assert seen[0] == seen[1] == seen[2]
