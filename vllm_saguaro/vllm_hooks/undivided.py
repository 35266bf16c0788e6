"""A draft inside a rank of a tensor-parallel target is whole (vLLM 0.32 and 0.33, `distributed/parallel_state.py`).

vLLM's layers ask for the tensor-parallel group wherever they are made or run, and there is one for the process: the
target's. While the draft is at work its place is taken by the pipeline group, which is this rank alone, as a target
divided into a pipeline is refused. Groups of one rank give back what they are given; no other rank hears of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllm.distributed import parallel_state


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Whatever layers are made or run inside belong to this rank alone. Not for several threads at once.

    RuntimeError where there is no group of one rank: the target is a pipeline.
    """
    group, alone = parallel_state._TP, parallel_state._PP
    if alone is not None and alone.world_size > 1:
        raise RuntimeError("The draft cannot share a worker with pipeline parallelism.")
    if group is None or group.world_size == 1:
        yield
        return
    parallel_state._TP = alone
    try:
        yield
    finally:
        parallel_state._TP = group
