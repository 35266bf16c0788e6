"""What a soak is: how many requests, which faults, and the two servers that are asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from scripts.soaking.pair import KV_CACHE_BYTES, PLAIN_WORDS, PairSettings
from vllm_saguaro.benchmark.settings import SettingsError, relative
from vllm_saguaro.config import METHOD

KINDS = ("kill", "stop", "oom", "slow")
"""Faults that are done to the draft process: SIGKILL; SIGSTOP; no more memory; stopped and let go on in short turns."""

MAX_BATCHED_TOKENS = 256
"""Small, so that prompts come in pieces."""
RESTARTS_TO_SPARE = 5


@dataclass(frozen=True)
class Settings(PairSettings):
    """All that decides what is asked, in which order, and of whom. `faults`: how many of each kind."""

    requests: int = 20_000
    faults: dict[str, int] = field(default_factory=lambda: {"kill": 100})
    seed: int = 0
    concurrency: int = 24
    warm_up: int = 64
    hits_patience: float = 150.0
    """Seconds until hits must have returned: the longest back-off of a restart, loading, and some more."""

    @property
    def placement(self) -> str:
        """Where the draft side works."""
        return str(self.options.get("placement", "process"))

    def check(self) -> None:
        """Complain about what would fail after a server has been loaded. Raises `SettingsError`."""
        self.check_pair()
        if self.requests < 1:
            raise SettingsError(f"--requests must be at least 1, not {self.requests}")
        if self.concurrency < 1:
            raise SettingsError(f"--concurrency must be at least 1, not {self.concurrency}")
        for kind, count in self.faults.items():
            if kind not in KINDS:
                raise SettingsError(f"--faults {kind}: there is no such fault: write some of {', '.join(KINDS)}")
            if count < 0:
                raise SettingsError(f"--faults {kind}={count}: write a number of at least 0")
        room = self.requests - self.warm_up
        if sum(self.faults.values()) > max(0, room):
            raise SettingsError(
                f"{sum(self.faults.values())} faults do not fit into {self.requests} requests, of which the first "
                f"{self.warm_up} are the warm-up: write more --requests or fewer faults"
            )
        if self.faults_planned and self.placement == "inline":
            raise SettingsError("an inline draft has no process to do faults to: leave out --kills and --faults")

    @property
    def saguaro_options(self) -> dict[str, Any]:
        """The speculative config: what was asked for, and restarts enough for faults that follow one another."""
        return {"draft_restarts": self.faults_planned + RESTARTS_TO_SPARE} | self.options

    @property
    def faults_planned(self) -> int:
        """Faults of all kinds."""
        return sum(self.faults.values())

    def command(self, port: int, plain: bool) -> list[str]:
        """`vllm serve` with saguaro, or plain."""
        if plain:
            return [*self.serve_command(port, 2 * KV_CACHE_BYTES), *PLAIN_WORDS]
        command = [*self.serve_command(port, KV_CACHE_BYTES), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
        return [*command, "--speculative-config", json.dumps({"method": METHOD} | self.saguaro_options)]

    def to_json(self) -> dict[str, Any]:
        """What two runs must have in common to be one run; plain values only."""
        return {
            "target": relative(self.target),
            "prompt_file": relative(self.prompt_path),
            "requests": self.requests,
            "faults": {kind: self.faults[kind] for kind in KINDS if self.faults.get(kind)},
            "seed": self.seed,
            "concurrency": self.concurrency,
            "options": dict(sorted(self.options.items())),
            "warm_up": self.warm_up,
            "hits_patience": self.hits_patience,
        }
