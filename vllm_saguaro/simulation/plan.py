"""What is done in a world: which engine serves which load, and with what settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from vllm_saguaro.simulation.world import WorldError

ENGINES: Final = ("plain", "sd", "ssd", "ours")
"""Plain decoding (AR); ordinary speculation (drafts, then verifies); the paper's engine (waits for its whole table, and
for just-in-time drafts after a miss); ours (takes the depths that are there)."""
BACKUPS: Final = ("none", "jit")


@dataclass(frozen=True)
class Plan:
    """One engine under one load.

    `k` drafts a round, `branches` N (0: as many as pay, ours only), `drafts` draft models that share the requests, each
    on a device of its own. `batch` requests at once, `requests` in all, each of `tokens` decoded tokens. `waves`: the
    next ones start when all have finished, as in scripts/bench.py; else each starts in the place of one that ends.
    `backup`: what the paper's engine does after a miss. `adaptive`: fewer drafts are verified where more do not pay.
    `rests`: a draft of ours does not begin what would not be done in time (`timing.comes_too_late`). `most_rows`: rows
    of one draft forward at most, N is cut to that; 0: no limit.
    """

    engine: str
    k: int = 4
    branches: int = 0
    batch: int = 1
    requests: int = 64
    tokens: int = 256
    drafts: int = 1
    waves: bool = False
    backup: str = "jit"
    adaptive: bool = False
    rests: bool = True
    most_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise WorldError(f"engine {self.engine!r} is not known: write one of {', '.join(ENGINES)}")
        if self.backup not in BACKUPS:
            raise WorldError(f"backup {self.backup!r} is not known: write one of {', '.join(BACKUPS)}")
        for name, least in (("k", 1), ("branches", 0), ("batch", 1), ("requests", 1), ("tokens", 1), ("drafts", 1)):
            if getattr(self, name) < least:
                raise WorldError(f"{name} is {getattr(self, name)}: write a number of at least {least}")
        if self.most_rows < 0:
            raise WorldError(f"most_rows is {self.most_rows}: write a number of at least 0")

    def replace(self, **changes: Any) -> Plan:
        """The same but for these."""
        return dataclasses.replace(self, **changes)
