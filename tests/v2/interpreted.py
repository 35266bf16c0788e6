"""vLLM's Model Runner V2 in this process, on a CPU: Triton's kernels run in numpy, by Triton's own interpreter.

No file of vLLM is touched. vLLM brings stand-ins for CUDA's streams, events and pinned memory for its CPU backend; what
is missing is a Triton backend named "cpu" (`vllm/triton_utils/importing.py`). The rest mends what the interpreter of
Triton 3.9 cannot do. Streams run inline, so an order that is wrong on a GPU is right here, and nothing says how fast
anything is.

`install` comes before vLLM and Triton are imported, in a process that has `ENVIRONMENT`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def install() -> None:
    """Make runner V2 possible in this process."""
    import triton.backends

    # An entry without a compiler: nothing is compiled.
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_ActiveDriver)
    _mend_masks()
    _give_log1p()
    _rewrite_language_once()
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler

    # The kernel loops over rows with a Python int where the interpreter expects a tensor.
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def _mend_masks() -> None:
    """`vector mask & scalar bool` becomes an int32 array under the type int1, which load and store refuse."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask: Any) -> Any:
        if mask is not None and mask.data.dtype != bool:
            mask.data = mask.data.astype(bool)
        return mask

    def masked_load(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        return load(self, pointers, as_bool(mask), *others, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        return store(self, pointers, value, as_bool(mask), *others, **named)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


def _give_log1p() -> None:
    """libdevice has nothing for the interpreter; the rejection sampler's residual needs this one of it."""
    import triton.language as tl
    import triton.language.extra.libdevice as libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any, **_: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            data = np.log1p(x.handle.data)
        return tl.tensor(TensorHandle(data, x.handle.dtype), x.type)

    libdevice.log1p = log1p


def _rewrite_language_once() -> None:
    """The interpreter rewrites `triton.language` at every launch; kept rewritten, a step takes a fifth less."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    original: Callable[[Any], Any] = interpreter._patch_lang
    by_globals: dict[int, Any] = {}
    by_modules: dict[tuple[int, ...], Any] = {}

    class Kept:
        def restore(self) -> None:
            pass

    def patch(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in by_globals:
            modules = {id(v) for v in names.values() if inspect.ismodule(v) and v in (tl, tl.core)}
            key = tuple(sorted(modules))
            if key not in by_modules:
                original(function)  # never restored
                by_modules[key] = Kept()
            by_globals[id(names)] = by_modules[key]
        return by_globals[id(names)]

    interpreter._patch_lang = patch


@contextlib.contextmanager
def async_scheduling(value: bool) -> Iterator[None]:
    """An engine that is configured while this lasts has it so. The CPU platform forces it off; on GPUs it is on."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = value

    with mock.patch.object(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)):
        yield
