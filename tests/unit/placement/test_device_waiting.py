"""`MailboxDraft` only enqueues: it waits for nothing of the device, and enqueues the same whatever was found."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.placement.device_sides import CPU, SAMPLED, SHAPE, HostChannel, outcomes_of
from tests.v2.sync_guard import Synchronised, no_sync
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.registered_memory import RegisteredMemory

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount", "_unique2")
PROMPT = [3, 1, 4, 1, 5, 9]


class Enqueued(TorchDispatchMode):
    """What is enqueued, with the shapes and dtypes. Whatever waits for a value raises."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in READS, f"{name} waits for the device"
        assert not (name in ("index", "index_put_") and any(_masks(args[1]))), f"{name} by a mask waits for the device"
        tensors = [(tuple(t.shape), t.dtype) for t in args if isinstance(t, torch.Tensor)]
        self.operations.append((name, *tensors))
        return func(*args, **(kwargs or {}))


def _masks(indices: Any) -> list[bool]:
    return [index is not None and index.dtype == torch.bool for index in indices]


@pytest.fixture(autouse=True)
def _no_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways to the values that no mode sees; `outcomes_of` and the draft side do not need them."""
    for name in ("tolist", "numpy"):
        original = getattr(torch.Tensor, name)

        def checked(self: torch.Tensor, *arguments: Any, _name: str = name, _original: Any = original) -> Any:
            assert torch.utils._python_dispatch._get_current_dispatch_mode() is None, f"{_name} waits for the device"
            return _original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, checked)


def exchanged(draft: MailboxDraft, outcomes: DeviceOutcomes) -> tuple[Enqueued, DeviceDrafts]:
    with Enqueued() as enqueued, no_sync([]):  # against copies from the host; reads are the other one's
        drafts = draft.exchange(outcomes)
        draft.logits_into(outcomes, drafts, torch.zeros(SHAPE.slots, SHAPE.num_speculative_tokens, 40))
    return enqueued, drafts


def test_the_same_is_enqueued_whatever_is_found_and_nothing_is_read() -> None:
    channel = HostChannel()
    draft = MailboxDraft(channel, SHAPE, CPU, TWINS, logging.getLogger("test"))
    draft.wait_until_ready()
    with Enqueued(), no_sync([]):
        draft.admit(0, "a", PROMPT, SAMPLED)
        draft.admit(1, "b", PROMPT[1:], SAMPLED)
    nothing, drafts = exchanged(draft, outcomes_of([(0, 0, 5, 7), (1, -1, 5, 7)], 0.8))
    assert drafts.ready.tolist() == [0, 0]
    channel.work()
    table = channel.read(1)
    assert table is not None
    hit, drafts = exchanged(draft, outcomes_of([(1, table.accepted[0], table.bonus[0], 6), (0, 0, 39, 8)], 0.8))
    assert drafts.ready.tolist()[0] == 3
    assert hit.operations == nothing.operations
    assert len(hit.operations) > 50
    with Enqueued(), no_sync([]):
        draft.release(0, "a")
    draft.close()


def test_a_look_at_an_outcome_is_seen() -> None:
    outcomes = outcomes_of([(0, 0, 5, 7)])
    for look in (lambda t: int(t[0]), lambda t: t[t > 0], lambda t: t.tolist(), torch.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), Enqueued():
            look(outcomes.bonus)


def whole_step(draft: MailboxDraft) -> None:
    """All that a step may ask of a draft."""
    draft.admit(0, "a", PROMPT, SAMPLED)
    exchanged(draft, outcomes_of([(0, 0, 5, 7)], 0.8))
    draft.release(0, "a")


@pytest.mark.parametrize("step", ["admit", "release", "exchange", "logits_into"])
def test_a_copy_from_the_host_is_seen(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = getattr(MailboxDraft, step)

    def copying(self: MailboxDraft, *told: Any) -> Any:
        self._step.state[torch.arange(1), 1] = 0
        return method(self, *told)

    monkeypatch.setattr(MailboxDraft, step, copying)
    draft = MailboxDraft(HostChannel(), SHAPE, CPU, TWINS, logging.getLogger("test"))
    draft.wait_until_ready()
    with pytest.raises(Synchronised), no_sync([]):
        whole_step(draft)


# ---- the memory -----------------------------------------------------------------------------------------------------


GPU = torch.device("cuda", 1)


class Cudart:
    """Stands in for CUDA's runtime, with the error that it keeps until somebody asks, and for the device in force."""

    def __init__(self, refused: int = 0, kept: int = 0, *, exported: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.current, self.pending = 0, 0
        self._refused, self._kept = refused, kept
        if exported:
            self.cudaGetLastError = self.asked

    def asked(self) -> int:
        found, self.pending = self.pending, 0
        return found

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("register", address, size, flags, self.current))
        self.pending = self._refused
        return self._refused

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        self.pending = self._kept
        return self._kept

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.fixture
def runs_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cudart]:
    """Put a runtime in the place of CUDA's; torch looks through a pointer, or copies what is there."""

    def installed(runtime: Cudart, *, copies: bool = False) -> Cudart:
        def as_tensor(what: Any, device: torch.device) -> torch.Tensor:
            said = what.__cuda_array_interface__
            assert (said["typestr"], said["data"][1], device, runtime.current) == ("<i8", False, GPU, GPU.index)
            words = (ctypes.c_int64 * said["shape"][0]).from_address(said["data"][0])
            found = torch.frombuffer(words, dtype=torch.int64)
            return found.clone() if copies else found

        def launched(*shape: int, device: torch.device) -> torch.Tensor:
            if error := runtime.asked():
                raise RuntimeError(f"CUDA error {error}")
            return torch.zeros(*shape)

        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "device", runtime.device)
        monkeypatch.setattr(torch, "as_tensor", as_tensor)
        monkeypatch.setattr(torch, "ones", launched)
        return runtime

    return installed


def test_memory_is_registered_once_and_given_back_once(runs_on: Callable[..., Cudart]) -> None:
    runtime = runs_on(Cudart())
    memory = RegisteredMemory(memoryview(bytearray(64)), GPU)
    address = memory.host.data_ptr()
    assert runtime.calls == [("register", address, 64, 3, 1)], "under the device that will look at it"
    assert runtime.current == 0
    memory.host[3] = 7
    assert memory.seen.tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    memory.close()
    memory.close()
    assert runtime.calls[1:] == [("unregister", address)]


@pytest.mark.parametrize("exported", [False, True], ids=["a launch asks", "the runtime is asked"])
def test_memory_that_cuda_refuses_is_an_error_that_says_so_and_none_of_the_targets(
    exported: bool, runs_on: Callable[..., Cudart]
) -> None:
    runtime = runs_on(Cudart(refused=2, exported=exported))
    with pytest.raises(RuntimeError, match="64 bytes of the draft's mailbox: error 2"):
        RegisteredMemory(memoryview(bytearray(64)), GPU)
    assert runtime.pending == 0, "the target's next launch would throw it"
    assert [call[0] for call in runtime.calls] == ["register"]


def test_an_error_at_the_end_is_none_of_the_targets_either(runs_on: Callable[..., Cudart]) -> None:
    runtime = runs_on(Cudart(kept=7))
    RegisteredMemory(memoryview(bytearray(64)), GPU).close()
    assert runtime.pending == 0


def test_a_copy_in_the_place_of_the_memory_is_refused(runs_on: Callable[..., Cudart]) -> None:
    """It would never change: every outcome would be a miss, and nobody would know why."""
    runtime = runs_on(Cudart(), copies=True)
    with pytest.raises(RuntimeError, match="sees a copy of the draft's mailbox"):
        RegisteredMemory(memoryview(bytearray(64)), GPU)
    assert [call[0] for call in runtime.calls] == ["register", "unregister"]


def test_on_the_cpu_both_are_the_memory_itself() -> None:
    buffer = bytearray(16)
    memory = RegisteredMemory(memoryview(buffer), CPU)
    memory.seen[1] = 258
    assert buffer[8:10] == b"\x02\x01"
    assert memory.host[1] == 258
    memory.close()
