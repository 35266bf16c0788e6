"""Where the host waits for the device while an engine serves, and on whose account.

On a GPU torch warns of each operation that waits (`set_sync_debug_mode`), and the explicit waits, of which it says
nothing, are wrapped: so every wait of a step is noted, with the stack that led to it. A wait is the plugin's where the
plugin waits itself, or has called whatever waits; but not where it is only passed through on the way from one part of
vLLM to another (`THROUGH`).

On a CPU a read costs nothing, and vLLM's own reads cannot be told from ours: there the plugin's doors alone are watched
(`propose`, who comes and goes, the marking of filler), by the guard of `tests/v2`, where a read raises.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

import vllm_saguaro

THROUGH = {
    ("vllm_hooks/device_worker.py", "execute_model"),
    ("vllm_hooks/marked_sampler.py", "__call__"),
    ("vllm_hooks/device_ranks.py", "book"),
}
"""Functions of the plugin that hand a step on to vLLM's own of the same name."""

_PACKAGE = Path(vllm_saguaro.__file__).resolve().parent
_MACHINERY = (str(Path(torch.__file__).parent), warnings.__file__, contextlib.__file__, __file__)
"""Where a wait is made or noted, but never asked for."""


@dataclass(slots=True)
class Waits:
    """Places, as "file:line", or "file:line (from file:line)" where the plugin called what waits."""

    calls: int = 0
    """Of `propose`."""
    in_propose: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    of_vllm: set[str] = field(default_factory=set)
    proposing: bool = False

    def note(self) -> None:
        """Something waits, below the caller."""
        place, ours = account(sys._getframe(1))
        if self.proposing:
            self.in_propose.add(place)
        else:
            (self.outside if ours else self.of_vllm).add(place)

    def to_json(self) -> dict[str, Any]:
        """How often `propose` was called, and what waited within it, elsewhere in the plugin, and in vLLM."""
        places = {"waits": self.in_propose, "outside": self.outside, "of_vllm": self.of_vllm}
        return {"calls": self.calls} | {name: sorted(found) for name, found in places.items()}


def account(frame: FrameType | None) -> tuple[str, bool]:
    """(the place of a wait, whether it is the plugin's), by the stack from `frame` outwards."""
    inmost: FrameType | None = None
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_MACHINERY):
            inmost = inmost or frame
            own = _own(frame)
            if own is not None:
                if frame is inmost:
                    return _place(frame), True
                ours = (own, frame.f_code.co_name) not in THROUGH
                return f"{_place(inmost)} (from {_place(frame)})" if ours else _place(inmost), ours
        frame = frame.f_back
    return _place(inmost) if inmost else "?", False


def _own(frame: FrameType) -> str | None:
    """The file in the package, if it is one of the plugin's."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(_PACKAGE).as_posix() if path.is_relative_to(_PACKAGE) else None


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@contextlib.contextmanager
def watched(worker: Any) -> Iterator[Waits]:
    """Watch an engine's worker while this lasts."""
    waits = Waits()
    speculator = worker.model_runner.speculator
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(all_noted(waits))
            within: Callable[..., contextlib.AbstractContextManager[Any]] = _nothing_more
        else:
            stack.enter_context(_doors_guarded(worker))
            within = _batch_guarded
        propose = speculator.propose

        def counted(*arguments: Any, **named: Any) -> Any:
            waits.calls += 1
            waits.proposing = True
            try:
                with within((*arguments, *named.values())):
                    return propose(*arguments, **named)
            finally:
                waits.proposing = False

        stack.enter_context(mock.patch.object(speculator, "propose", counted))
        yield waits


@contextlib.contextmanager
def all_noted(waits: Waits) -> Iterator[None]:
    """Note what waits for a GPU, whoever it is."""

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arguments: Any, **named: Any) -> Any:
            waits.note()
            return original(*arguments, **named)

        return waiting

    def shown(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA" in str(message):
            waits.note()

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(mock.patch.object(warnings, "showwarning", shown))
        owners: tuple[Any, ...] = (torch.cuda.Event, torch.cuda.Stream, torch.cuda)
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, "synchronize", noting(owner.synchronize)))
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def _nothing_more(_: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _guard(values: Any) -> contextlib.AbstractContextManager[Any]:
    guard: contextlib.AbstractContextManager[Any] = importlib.import_module("tests.v2.sync_guard").no_sync(
        [value for value in values if isinstance(value, torch.Tensor)]
    )
    return guard


def _batch_guarded(arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """A read of what `propose` was given raises."""
    batch = arguments[0]
    on_host = batch.seq_lens_cpu_upper_bound
    return _guard(value for value in (*vars(batch).values(), *arguments[1:]) if value is not on_host)


@contextlib.contextmanager
def _doors_guarded(worker: Any) -> Iterator[None]:
    """A read outside of `propose` raises: where requests come and go, and where filler is marked."""
    runner = worker.model_runner
    speculator, marked, states = runner.speculator, runner.rejection_sampler, runner.req_states
    buffers = (states.all_token_ids, states.total_len, states.num_computed_tokens, states.prefill_len)
    held = [*vars(speculator).values(), states.last_sampled_tokens, *(buffer.gpu for buffer in buffers)]
    inner = marked._sampler

    def guarded(call: Callable[[Any], None]) -> Callable[[Any], None]:
        def door(step: Any) -> None:
            with _guard(held):
                call(step)

        return door

    class Guarded(type(marked)):  # type: ignore[misc]
        def __call__(self, logits: Any, batch: Any, *others: Any) -> Any:
            with _guard((*held, *vars(batch).values())) as guard:

                def unguarded(*arguments: Any) -> Any:
                    guard.paused = True  # vLLM's own sampler is vLLM's business
                    return inner(*arguments)

                self._sampler = unguarded
                return super().__call__(logits, batch, *others)

    with contextlib.ExitStack() as stack:
        for name in ("begin_step", "follow_step"):
            stack.enter_context(mock.patch.object(speculator, name, guarded(getattr(speculator, name))))
        stack.enter_context(mock.patch.object(runner, "rejection_sampler", Guarded(inner, marked._ready)))
        yield
