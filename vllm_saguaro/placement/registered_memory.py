"""Memory of this process that a device reaches: pinned and mapped for CUDA, as it is where the device is the CPU."""

from __future__ import annotations

import contextlib

import torch

_PORTABLE_AND_MAPPED = 1 | 2


class RegisteredMemory:
    """`host` [words] int64 is the memory as the host sees it, and the end of copies; `seen` is the same for kernels.

    Both keep the memory mapped: it goes with the last of them. `close` undoes the registration; the caller sees to it
    that no work of the device that touches the memory is under way then.
    """

    def __init__(self, memory: memoryview, device: torch.device) -> None:
        """`memory`: writable, a multiple of 8 bytes. Raises `RuntimeError` when CUDA cannot register it.

        Nothing is left behind then, not even the error in CUDA's own books.
        """
        self.host = torch.frombuffer(memory, dtype=torch.int64)
        self._registered = 0
        if device.type == "cpu":
            self.seen = self.host
            return
        self._device = device
        address, size = self.host.data_ptr(), self.host.numel() * self.host.element_size()
        with torch.cuda.device(device):  # CUDA counts registered memory to the device that is current
            error = int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE_AND_MAPPED))
            if error:
                _take_error_back(device)
                raise RuntimeError(f"CUDA cannot register the {size} bytes of the draft's mailbox: error {error}")
            self._registered = address
            try:
                self.seen = _seen(address, self.host.numel(), device)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Undo the registration."""
        if self._registered:
            error = int(torch.cuda.cudart().cudaHostUnregister(self._registered))
            self._registered = 0
            if error:
                _take_error_back(self._device)


def _seen(address: int, words: int, device: torch.device) -> torch.Tensor:
    """Registered memory as a tensor of the device. With unified addressing it has the same address there."""
    seen = torch.as_tensor(_Address(address, words), device=device)
    if seen.data_ptr() != address:  # where torch takes the memory for another device's, it makes a copy
        raise RuntimeError(f"{device} sees a copy of the draft's mailbox, which would never change")
    return seen


def _take_error_back(device: torch.device) -> None:
    """CUDA keeps the error of a call until somebody asks for it: that would be a launch of the target's."""
    runtime = torch.cuda.cudart()
    if hasattr(runtime, "cudaGetLastError"):
        runtime.cudaGetLastError()
        return
    with contextlib.suppress(RuntimeError):  # torch asks after each launch, and throws what it finds
        torch.ones(1, device=device).add_(1)


class _Address:
    """What lies at an address, in the words of numba's `__cuda_array_interface__`, which torch takes without a copy."""

    def __init__(self, address: int, words: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (words,),
            "typestr": "<i8",
            "strides": None,
            "version": 2,
        }
