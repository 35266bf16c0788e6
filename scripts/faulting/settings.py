"""Which faults are done to which server, beside how many streams, and how the servers are started."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from scripts.soaking.pair import KV_CACHE_BYTES, MAX_RUNNING, PLAIN_WORDS, PairSettings
from vllm_saguaro.benchmark.settings import SettingsError, relative
from vllm_saguaro.config import METHOD


class Kind(StrEnum):
    """What is done to the draft side."""

    KILL = "kill"
    """SIGKILL."""
    HANG = "hang"
    """SIGSTOP, until the engine ends it."""
    SLOW = "slow"
    """SIGSTOP, and SIGCONT before the engine would end it."""
    OOM = "oom"
    """No more memory: a memory cgroup that is full, so that the kernel ends it; prlimit where there is none."""
    CUT = "cut"
    """The link to another node falls silent: the kernel drops all that comes in at either end."""
    NODE = "node"
    """Every process of the draft's Ray node is killed at once; another node joins."""
    DYING = "dying"
    """Every draft process is killed as soon as it is there, until the engine leaves the draft off."""


KINDS_OF: dict[str, tuple[Kind, ...]] = {
    "process": (Kind.KILL, Kind.HANG, Kind.SLOW, Kind.OOM, Kind.DYING),
    "ray": (Kind.KILL, Kind.HANG, Kind.DYING),
    "nodes": (Kind.KILL, Kind.CUT, Kind.NODE),
}
"""By placement, in the order in which they are done. "ray": an actor in a Ray of the engine's own, on this node.
"nodes": a cluster of two Ray nodes on this machine, the draft on the one that has not the engine."""

DEFAULT_RESTARTS = 5
"""`draft_restarts` as it is by default."""
TRIES_TO_SPARE = 2
"""So often at least may the draft be started again after the other faults."""
FAR = "far"
"""The resource that only the draft's nodes have."""


@dataclass(frozen=True)
class Settings(PairSettings):
    """All options. `only`: kinds; none: all that there are for a placement. `seconds`: of quiet before each fault."""

    placements: tuple[str, ...] = tuple(KINDS_OF)
    only: tuple[Kind, ...] = ()
    seconds: float = 10.0
    concurrency: int = 6
    seed: int = 0
    patience: float = 180.0
    """Seconds until hits must have returned, or the draft must have been left off."""

    def kinds(self, placement: str) -> tuple[Kind, ...]:
        """What is done to the draft of this placement, in this order."""
        return tuple(kind for kind in KINDS_OF[placement] if not self.only or kind in self.only)

    def check(self) -> None:
        """Complain about what would fail after a server has been loaded. Raises `SettingsError`."""
        self.check_pair()
        if not 1 <= self.concurrency <= MAX_RUNNING:
            raise SettingsError(f"--concurrency must be from 1 to {MAX_RUNNING}, not {self.concurrency}")
        if not self.seconds > 0:
            raise SettingsError(f"--seconds must be more than 0, not {self.seconds:g}")
        for key in ("placement", "ray_options"):
            if key in self.options:
                raise SettingsError(f"--option {key}: write --placement, with one of {', '.join(KINDS_OF)}")
        for placement in self.placements:
            if not self.kinds(placement):
                possible = ", ".join(KINDS_OF[placement])
                raise SettingsError(f"--only {' '.join(self.only)}: of --placement {placement} there are {possible}")
        if set(self.placements) != {"process"} and importlib.util.find_spec("ray") is None:
            raise SettingsError('there is no Ray here: pip install ".[ray]", or write --placement process')

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "target": relative(self.target),
            "prompt_file": relative(self.prompt_path),
            "faults": {placement: [str(kind) for kind in self.kinds(placement)] for placement in self.placements},
            "seconds": self.seconds,
            "concurrency": self.concurrency,
            "seed": self.seed,
            "options": dict(sorted(self.options.items())),
            "patience": self.patience,
        }


@dataclass(frozen=True)
class Serving:
    """One server: the settings with a placement. `address`: of the Ray cluster, for "nodes"."""

    settings: Settings
    placement: str
    address: str | None = None

    @property
    def restarts(self) -> int:
        """`draft_restarts`: the usual number, or as many as the faults need that are done before the last one."""
        ended = sum(kind not in (Kind.SLOW, Kind.DYING) for kind in self.settings.kinds(self.placement))
        return max(DEFAULT_RESTARTS, ended + TRIES_TO_SPARE)

    @property
    def saguaro_options(self) -> dict[str, Any]:
        """The speculative config."""
        found: dict[str, Any] = {"draft_restarts": self.restarts}
        if self.placement != "process":
            found["placement"] = "ray"
        if self.address is not None:
            found["ray_options"] = {"address": self.address, "resources": {FAR: 1}}
        return found | self.settings.options

    def command(self, port: int, plain: bool) -> list[str]:
        """`vllm serve` with saguaro, or plain."""
        command = self.settings.serve_command(port, 4 * KV_CACHE_BYTES)
        if plain:
            return [*command, *PLAIN_WORDS]
        return [*command, "--speculative-config", json.dumps({"method": METHOD} | self.saguaro_options)]
