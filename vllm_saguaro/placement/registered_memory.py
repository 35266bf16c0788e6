"""Memory of this process that a device reaches: pinned and mapped for CUDA, as it is where the device is the CPU."""

from __future__ import annotations

import torch

_PORTABLE_AND_MAPPED = 1 | 2


class RegisteredMemory:
    """`host` [words] int64 is the memory as the host sees it, and the end of copies; `seen` is the same for kernels.

    Both keep the memory mapped: it goes with the last of them. `close` undoes the registration; the caller sees to it
    that no work of the device that touches the memory is under way then.
    """

    def __init__(self, memory: memoryview, device: torch.device) -> None:
        """`memory`: writable, a multiple of 8 bytes. Raises `RuntimeError` when CUDA cannot register it."""
        self.host = torch.frombuffer(memory, dtype=torch.int64)
        self._registered = 0
        if device.type == "cpu":
            self.seen = self.host
            return
        size = self.host.numel() * self.host.element_size()
        error = int(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), size, _PORTABLE_AND_MAPPED))
        if error:
            raise RuntimeError(f"CUDA cannot register the {size} bytes of the draft's mailbox: error {error}")
        self._registered = self.host.data_ptr()
        try:
            # With unified addressing registered memory has the same address on the device.
            self.seen = torch.as_tensor(_Address(self._registered, self.host.numel()), device=device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Undo the registration."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = 0


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
