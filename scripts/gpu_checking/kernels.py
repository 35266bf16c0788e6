"""Every Triton kernel against its twin, and on a GPU how long each takes at the size of a full batch.

python -m scripts.gpu_checking.kernels DEVICE SEEDS      one JSON object on standard output
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from scripts.gpu_checking.kernel_cases import MAKERS, Sizes, disagreement, make_case
from vllm_saguaro.kernels.operations import TWINS, triton_kernels

KERNELS = triton_kernels()

SMALL = (Sizes(), Sizes(rows=1, branches=24, drafts=5, candidates=9, width=70, block_size=16), Sizes(rows=7, width=3))
SERVING = Sizes(slots=64, rows=16, branches=24, drafts=4, candidates=64, width=256, block_size=16)
FULL = Sizes(slots=64, rows=64, branches=64, drafts=16, candidates=64, width=512, block_size=16)
"""The largest that is promised."""

_BLOCK_BYTES = 1 << 15
_LAYERS = 16
"""What `copy_blocks` is timed with: a block of a 1B model in one layer, and its layers."""


def check(device: torch.device, seeds: int) -> dict[str, Any]:
    """`disagreements`: what differs, in words; `microseconds`: of each kernel (in a CUDA graph), on a GPU alone."""
    sizes = [*SMALL, *([SERVING, FULL] if device.type == "cuda" else [])]
    wrong = []
    cases = 0
    for name in MAKERS:
        for seed in range(seeds):
            for size in sizes:
                case = make_case(name, size, seed, strided=seed % 2 == 1)
                cases += 1
                if found := disagreement(case, getattr(KERNELS, name), getattr(TWINS, name), device):
                    wrong.append(f"{name}, seed {seed}, {size}: {found[:300]}")
    times = {name: microseconds(name, device) for name in MAKERS} if device.type == "cuda" else {}
    return {"cases": cases, "disagreements": wrong[:20], "microseconds": times}


def microseconds(name: str, device: torch.device, launches: int = 50) -> float:
    """How long one call takes inside a CUDA graph, so without the host: the mean of `launches` in a row."""
    if name == "copy_blocks":
        count = SERVING.rows * SERVING.branches
        pages = torch.zeros(_LAYERS, 2 * count, _BLOCK_BYTES, dtype=torch.int8, device=device)
        order = torch.arange(2 * count, dtype=torch.int32, device=device)
        arguments: tuple[Any, ...] = (pages, order[:count], order[count:])
    else:
        arguments = make_case(name, SERVING, 0).copied(device)
    operation, stream = getattr(KERNELS, name), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        operation(*arguments)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(launches):
                operation(*arguments)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record(stream)
        graph.replay()
        end.record(stream)
        stream.synchronize()
    return round(begin.elapsed_time(end) * 1000 / launches, 2)


def main() -> None:
    """Print the answer; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers.write(json.dumps(check(torch.device(sys.argv[1]), int(sys.argv[2]))) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
