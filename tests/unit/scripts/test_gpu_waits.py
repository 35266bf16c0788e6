"""Waits of the host: whose they are, and that every way to one is seen."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import vllm_saguaro
from scripts.gpu_checking import waits
from scripts.gpu_checking.waits import THROUGH, Waits, account, all_noted, watched

OURS = Path(vllm_saguaro.__file__).resolve().parent
VLLM = Path("/site-packages/vllm/v1/worker/gpu/model_runner.py")
TORCH = Path(torch.__file__).parent / "_tensor.py"
CUDA: Any = torch.cuda


def calls_below(path: Path, name: str, then: Callable[[], Any]) -> Callable[[], Any]:
    """A function of this name in this file, which calls the next one."""
    space: dict[str, Any] = {"then": then}
    exec(compile(f"def {name}():\n    return then()\n", str(path), "exec"), space)
    function: Callable[[], Any] = space[name]
    return function


def accounted(*stack: tuple[Path, str]) -> tuple[str, bool]:
    """Of a wait at the end of a stack, the outermost first."""
    call: Callable[[], Any] = lambda: account(sys._getframe(1))  # noqa: E731
    for path, name in reversed(stack):
        call = calls_below(path, name, call)
    found: tuple[str, bool] = call()
    return found


def test_a_wait_of_ours_is_ours_wherever_torch_waits() -> None:
    hooks = OURS / "vllm_hooks" / "device_worker.py"
    assert accounted((VLLM, "step"), (OURS / "speculator.py", "propose")) == ("speculator.py:2", True)
    assert accounted((VLLM, "step"), (OURS / "speculator.py", "propose"), (TORCH, "item")) == ("speculator.py:2", True)
    assert accounted((VLLM, "step"), (hooks, "execute_model")) == ("device_worker.py:2", True)


def test_a_wait_in_vllm_is_ours_where_we_called_it_and_not_where_we_are_passed_through() -> None:
    hooks = OURS / "vllm_hooks"
    assert accounted((hooks / "device_draft_model.py", "read"), (VLLM, "build"), (TORCH, "cpu")) == (
        "model_runner.py:2 (from device_draft_model.py:2)",
        True,
    )
    assert accounted((hooks / "device_worker.py", "execute_model"), (VLLM, "execute_model")) == (
        "model_runner.py:2",
        False,
    )
    assert accounted((VLLM, "step"), (TORCH, "item"))[1] is False


def test_what_a_step_is_passed_through_exists() -> None:
    for file, name in THROUGH:
        assert f"def {name}(" in (OURS / file).read_text(encoding="utf-8")


class Event:
    def synchronize(self) -> str:
        return "done"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the waits of torch; the modes that were set."""
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.Stream", type("Stream", (Event,), {}))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: "done")
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    return modes


def test_each_way_to_wait_is_noted_and_waits_all_the_same(cuda: list[str]) -> None:
    found = Waits()
    with all_noted(found):
        assert CUDA.Event().synchronize() == "done"
        assert CUDA.Stream().synchronize() == "done"
        assert CUDA.synchronize() == "done"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert cuda == ["warn", "default"]
    assert len(found.of_vllm) == 4
    assert all(place.startswith("test_gpu_waits.py:") for place in found.of_vllm)
    torch.cuda.synchronize()
    assert len(found.of_vllm) == 4


def test_within_propose_each_wait_counts_and_outside_those_of_ours(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    wait = CUDA.Event().synchronize
    calls_vllm = calls_below(VLLM, "other", lambda: torch.cuda.synchronize())
    calls_ours = calls_below(OURS / "drafting" / "readings.py", "read_on", lambda: torch.cuda.synchronize())
    speculator = types.SimpleNamespace(propose=lambda batch: calls_vllm())
    worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(speculator=speculator))
    with watched(worker) as found:
        speculator.propose("batch")
        calls_vllm()
        calls_ours()
    assert wait() == "done"
    assert found.calls == 1
    assert {name: bool(places) for name, places in found.to_json().items()} == {
        "calls": True,
        "waits": True,
        "outside": True,
        "of_vllm": True,
    }
    assert [place for place in found.outside if "readings.py" in place]
    assert not [place for place in found.of_vllm if "readings.py" in place]


# ---- the doors on a CPU ----------------------------------------------------------------------------------------------


class Marked:
    """As `MarkedSampler`."""

    def __init__(self, sampler: Callable[..., Any], ready: torch.Tensor) -> None:
        self._sampler, self._ready = sampler, ready

    def __call__(self, logits: Any, batch: Any, *others: Any) -> Any:
        return self._sampler(logits, batch, self._ready * batch.positions)


class Speculator:
    """Reads what it is told to."""

    def __init__(self) -> None:
        self.ready = torch.zeros(2)
        self.reads = ""

    def _do(self, name: str, *tensors: torch.Tensor) -> None:
        for tensor in (self.ready, *tensors):
            tensor.add_(1)
            if self.reads == name:
                tensor.tolist()

    def begin_step(self, step: Any) -> None:
        self._do("begin_step")

    def follow_step(self, step: Any) -> None:
        self._do("follow_step")

    def propose(self, batch: Any) -> None:
        batch.on_host.tolist()
        self._do("propose", batch.positions)


def worker_of(speculator: Speculator) -> Any:
    names = ("all_token_ids", "total_len", "num_computed_tokens", "prefill_len")
    states = types.SimpleNamespace(
        last_sampled_tokens=torch.zeros(2), **{name: types.SimpleNamespace(gpu=torch.zeros(2)) for name in names}
    )
    marked = Marked(lambda logits, batch, filler: filler.tolist(), speculator.ready)
    runner = types.SimpleNamespace(speculator=speculator, rejection_sampler=marked, req_states=states)
    return types.SimpleNamespace(model_runner=runner)


def step(worker: Any) -> None:
    runner = worker.model_runner
    host = torch.zeros(2)
    batch = types.SimpleNamespace(positions=torch.ones(2), on_host=host, seq_lens_cpu_upper_bound=host)
    runner.speculator.begin_step("step")
    runner.speculator.follow_step("step")
    runner.rejection_sampler("logits", batch)
    runner.speculator.propose(batch)


def test_on_a_cpu_the_doors_may_not_read_and_vllm_may() -> None:
    speculator = Speculator()
    worker = worker_of(speculator)
    marked = worker.model_runner.rejection_sampler
    with watched(worker) as found:
        step(worker)
        step(worker)
    assert found.to_json() == {"calls": 2, "waits": [], "outside": [], "of_vllm": []}
    assert worker.model_runner.rejection_sampler is marked
    assert set(vars(speculator)) == {"ready", "reads"}


@pytest.mark.parametrize("door", ["begin_step", "follow_step", "propose"])
def test_on_a_cpu_a_read_at_a_door_raises(door: str) -> None:
    from tests.v2.sync_guard import Synchronised

    speculator = Speculator()
    speculator.reads = door
    worker = worker_of(speculator)
    with pytest.raises(Synchronised, match="tolist"), watched(worker):
        step(worker)


def test_on_a_cpu_a_read_where_filler_is_marked_raises() -> None:
    from tests.v2.sync_guard import Synchronised

    worker = worker_of(Speculator())

    class Reading(Marked):
        def __call__(self, logits: Any, batch: Any, *others: Any) -> Any:
            self._ready.tolist()

    worker.model_runner.rejection_sampler = Reading(lambda *_: None, worker.model_runner.speculator.ready)
    with pytest.raises(Synchronised, match="tolist"), watched(worker):
        step(worker)


def test_the_guard_of_the_tests_is_where_the_check_looks_for_it() -> None:
    assert Path(waits.__file__).parents[2].joinpath("tests", "v2", "sync_guard.py").is_file()
