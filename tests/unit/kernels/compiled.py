"""Compiles every kernel for a GPU of the Hopper generation, as its launcher calls it; no GPU is needed for that.

    python compiled.py [SOURCE]      one JSON object: the size of each kernel's machine code, and which read past caches

SOURCE: another file in the place of `branch_step.py`. Of the numbers that a launch would be specialised for, those that
are 1 become constants, as they do in Triton.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from scripts.gpu_checking.kernel_cases import MAKERS, Sizes, make_case
from tests.unit.kernels.interpreted import MODULES, _module

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.float32: "fp32",
    torch.bool: "i1",
}
SIZES = (
    Sizes(rows=2, branches=24, drafts=4, candidates=64, width=64, block_size=16),
    Sizes(rows=2, branches=64, drafts=16, candidates=64, width=2000, block_size=16),
    Sizes(rows=1, branches=30, drafts=1, candidates=3, width=1, block_size=1),
    Sizes(rows=1, branches=1, drafts=1, candidates=1, width=1, block_size=16),
)


class Compiled:
    """Stands in a kernel's place: a launch compiles it."""

    def __init__(self, kernel: Any, sizes: dict[str, int], past_caches: set[str]) -> None:
        self._kernel, self._sizes, self._past_caches = kernel, sizes, past_caches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        signature: dict[str, str] = {}
        for parameter, value in zip(self._kernel.params, arguments, strict=False):
            name = parameter.name
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
            elif parameter.annotation_type:
                signature[name] = parameter.annotation_type
            elif value == 1 and not parameter.do_not_specialize:
                constants[name] = 1
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
        signature = {name: signature.get(name, "constexpr") for name in self._kernel.arg_names}
        source = ASTSource(fn=self._kernel, signature=signature, constexprs=constants)
        found = triton.compile(source, target=TARGET, options={"num_warps": num_warps})
        self._sizes[self._kernel.__name__] = len(found.asm["cubin"])
        loads = re.findall(r"ld\.global\S*", found.asm["ptx"])
        if any(".cv" in load for load in loads):
            self._past_caches.add(self._kernel.__name__)


def main() -> None:
    sizes, past_caches = dict[str, int](), set[str]()
    modules = {name: importlib.import_module(f"vllm_saguaro.kernels.{name}") for name in set(MODULES.values())}
    if len(sys.argv) > 1:
        modules["branch_step"] = _module("branch_step", Path(sys.argv[1]))
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, Compiled(value, sizes, past_caches))
    for name in MAKERS:
        for seed, size in enumerate(SIZES):
            getattr(modules[MODULES[name]], name)(*make_case(name, size, seed, strided=seed == 1).arguments)
    print(json.dumps({"sizes": sizes, "past caches": sorted(past_caches)}))


if __name__ == "__main__":
    main()
