"""`MailboxDraft` only enqueues: it waits for nothing of the device, and enqueues the same whatever was found."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.placement.device_sides import CPU, SAMPLED, SHAPE, HostChannel, lookup, outcomes_of
from tests.v2.sync_guard import Synchronised, no_sync
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
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
    draft = MailboxDraft(channel, SHAPE, CPU, lookup, logging.getLogger("test"))
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
        self._state[torch.arange(1), 1] = 0
        return method(self, *told)

    monkeypatch.setattr(MailboxDraft, step, copying)
    draft = MailboxDraft(HostChannel(), SHAPE, CPU, lookup, logging.getLogger("test"))
    draft.wait_until_ready()
    with pytest.raises(Synchronised), no_sync([]):
        whole_step(draft)


# ---- the memory -----------------------------------------------------------------------------------------------------


class Cudart:
    """Stands in for CUDA's runtime."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._error = error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("register", address, size, flags))
        return self._error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def test_memory_is_registered_once_and_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    seen = []

    def as_tensor(what: Any, device: torch.device) -> torch.Tensor:
        seen.append(what.__cuda_array_interface__)
        return torch.zeros(what.__cuda_array_interface__["shape"], dtype=torch.int64)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    memory = RegisteredMemory(memoryview(bytearray(64)), torch.device("cuda", 0))
    address = memory.host.data_ptr()
    assert runtime.calls == [("register", address, 64, 3)]
    assert [(s["data"], s["shape"], s["typestr"]) for s in seen] == [((address, False), (8,), "<i8")]
    memory.close()
    memory.close()
    assert runtime.calls[1:] == [("unregister", address)]


def test_memory_that_cuda_refuses_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(error=2))
    with pytest.raises(RuntimeError, match="64 bytes of the draft's mailbox: error 2"):
        RegisteredMemory(memoryview(bytearray(64)), torch.device("cuda", 0))


def test_on_the_cpu_both_are_the_memory_itself() -> None:
    buffer = bytearray(16)
    memory = RegisteredMemory(memoryview(buffer), CPU)
    memory.seen[1] = 258
    assert buffer[8:10] == b"\x02\x01"
    assert memory.host[1] == 258
    memory.close()
