"""No implicit synchronisation: reading, from Python, tensors that lie on the device of a real GPU.

On a CPU such a read costs nothing and goes unnoticed. So while the guard is up, every way from a tensor to Python
values raises `Synchronised` for tensors of the guarded storages. Views are known by their storage, results by descent:
what an operation makes from a guarded tensor is guarded, too (`TorchFunctionMode`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS = frozenset(
    {
        *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere"),
        *("__bool__", "__int__", "__float__", "__index__", "__iter__", "__len__", "is_nonzero", "equal", "allclose"),
        *("bincount", "__array__", "__contains__", "__repr__", "_local_scalar_dense"),
    }
)
WITHOUT_A_SYNC = frozenset({"__len__", "__iter__", "__repr__"})
"""`len` is known; iterating over and showing a tensor is caught by what it reads."""


class Synchronised(BaseException):
    """A guarded tensor was read on the host. No `Exception`: that of a draft is caught, and the requests go on."""


class SyncGuard(TorchFunctionMode):
    """Raises at every read of a guarded tensor, and follows what is computed from one."""

    def __init__(self, guarded: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._kept = list(guarded)  # a storage that is gone would leave its address to a harmless one
        self._storages = {storage_of(tensor) for tensor in self._kept}
        self.paused = False
        self.operations = 0
        """Operations on guarded tensors that went through: a guard that saw none has guarded nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        touched = [t for t in _tensors((args, kwargs)) if storage_of(t) in self._storages]
        if touched:
            if name in READS - WITHOUT_A_SYNC:
                raise Synchronised(f"Tensor.{name}")
            if name in ("__getitem__", "__setitem__") and _has_mask(args[1]):
                raise Synchronised(f"Tensor.{name} with a boolean mask")
            if name == "repeat_interleave" and "output_size" not in kwargs:
                raise Synchronised("repeat_interleave without output_size")
            self.operations += 1
        result = func(*args, **kwargs)
        if touched:
            made = list(_tensors(result))
            self._kept += made
            self._storages.update(map(storage_of, made))
        return result


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def no_sync(guarded: Iterable[torch.Tensor]) -> Iterator[SyncGuard]:
    """While this lasts, reading these tensors or what comes from them raises `Synchronised`."""
    with SyncGuard(guarded) as guard:
        yield guard


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, tuple | list):
        for value in nested:
            yield from _tensors(value)


def _has_mask(index: Any) -> bool:
    return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(index))
