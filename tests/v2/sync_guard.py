"""No implicit synchronisation: reading device tensors from Python, and copies that the host waits for, on a real GPU.

On a CPU such a read costs nothing and goes unnoticed. So while the guard is up, every way from a tensor to Python
values raises `Synchronised` for tensors of the guarded storages. Views are known by their storage, results by descent:
what an operation makes from a guarded tensor is guarded, too (`TorchFunctionMode`).

The other way is a copy out of the host's pageable memory: `x[at] = 3`, `torch.tensor(values, device=..)`, a list as an
index. What is made of Python's values or of an array while the guard is up is the host's, until it is sent with
`non_blocking=True`; everything else counts as the device's. (Whether it was pinned a CPU does not know.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
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

OF_VALUES = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"})
"""Functions that make a tensor of what the host has."""


class Synchronised(BaseException):
    """The host would have waited for the device. No `Exception`: that of a draft is caught, and the requests go on."""


class SyncGuard(TorchFunctionMode):
    """Raises at every read of a guarded tensor, and follows what is computed from one; and at copies from the host."""

    def __init__(self, guarded: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._kept = list(guarded)  # a storage that is gone would leave its address to a harmless one
        self._storages = {storage_of(tensor) for tensor in self._kept}
        self._on_host: set[int] = set()
        self.paused = False
        self.operations = 0
        """Operations on guarded tensors that went through: a guard that saw none has guarded nothing."""

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are guarded from now on, too."""
        new = list(tensors)
        self._kept += new
        self._storages.update(map(storage_of, new))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = list(_tensors((args, kwargs)))
        touched = [t for t in given if storage_of(t) in self._storages]
        if touched:
            self._refuse_reads(name, args, kwargs)
            self.operations += 1
        self._refuse_copies(name, args, kwargs)
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if touched:
            self._kept += made
            self._storages.update(map(storage_of, made))
        elif (name in OF_VALUES and not given) or (given and all(map(self._is_on_host, given))):
            self._kept += made
            sent = _goes_to_a_device(name, args, kwargs)
            (self._on_host.difference_update if sent else self._on_host.update)(map(storage_of, made))
        return result

    def _refuse_reads(self, name: str, args: Any, kwargs: Any) -> None:
        if name in READS - WITHOUT_A_SYNC:
            raise Synchronised(f"Tensor.{name}")
        if name == "to" and "cpu" in (kwargs.get("device"), *(part for part in args[1:] if isinstance(part, str))):
            raise Synchronised("Tensor.to the host")
        if name in ("__getitem__", "__setitem__") and _has_mask(args[1]):
            raise Synchronised(f"Tensor.{name} with a boolean mask")
        if name == "repeat_interleave" and "output_size" not in kwargs:
            raise Synchronised("repeat_interleave without output_size")

    def _refuse_copies(self, name: str, args: Any, kwargs: Any) -> None:
        if name in ("__getitem__", "__setitem__") and not self._is_on_host(args[0]):
            if any(isinstance(part, list | np.ndarray) or self._is_on_host(part) for part in _parts(args[1])):
                raise Synchronised(f"Tensor.{name} with an index of the host's")
            if name == "__setitem__" and self._is_copied(*args):
                raise Synchronised("Tensor.__setitem__ of a value of the host's")
        elif name == "copy_" and self._is_on_host(args[0]) != self._is_on_host(args[1]):
            if not kwargs.get("non_blocking"):
                raise Synchronised("Tensor.copy_ between host and device")
        elif _goes_to_a_device(name, args, kwargs) and not kwargs.get("non_blocking"):
            source = args[1] if name == "new_tensor" else args[0]
            if self._is_on_host(source) or not isinstance(source, torch.Tensor):
                raise Synchronised(f"{name} of what the host has, on a device")

    def _is_copied(self, target: torch.Tensor, index: Any, value: Any) -> bool:
        """Whether writing `value` is a copy from the host. A number that fills a slice is an argument of a kernel."""
        if isinstance(value, torch.Tensor):
            if not self._is_on_host(value):
                return False
            if value.dim() > 0:
                return True
        at_places = any(isinstance(part, torch.Tensor) for part in _parts(index))
        return at_places or target[index].dim() == 0  # torch copies one element to one element

    def _is_on_host(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() > 0 and storage_of(value) in self._on_host


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def no_sync(guarded: Iterable[torch.Tensor]) -> Iterator[SyncGuard]:
    """While this lasts, what would make the host wait for these tensors, or for what comes of them, raises."""
    with SyncGuard(guarded) as guard, _arrays_are_seen(guard):
        yield guard


@contextlib.contextmanager
def _arrays_are_seen(guard: SyncGuard) -> Iterator[None]:
    """A tensor over an array is made past every function mode."""
    from_numpy = torch.from_numpy

    def seen(array: np.ndarray) -> torch.Tensor:
        tensor = from_numpy(array)
        if not guard.paused:
            guard._kept.append(tensor)
            guard._on_host.add(storage_of(tensor))
        return tensor

    with mock.patch.object(torch, "from_numpy", seen):
        yield


def _goes_to_a_device(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the result is where a device is named, or another tensor is."""
    if name == "to":
        named = (*args[1:], kwargs.get("device"), kwargs.get("other"))
        return any(isinstance(part, torch.device | torch.Tensor | str) for part in named)
    return name in ("cuda", "new_tensor") or (name in OF_VALUES and kwargs.get("device") is not None)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, tuple | list):
        for value in nested:
            yield from _tensors(value)


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _has_mask(index: Any) -> bool:
    return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(index))
