"""The tests' end of `tests.v2.v2_engine`: starts it, and reads what its engines gave."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import BASE, ENVIRONMENT, ROOT, Json, environment_at_start
from tests.v2 import interpreted

K = 4
OPTIONS: Json = BASE | {
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
}


def saguaro(**options: Any) -> Json:
    return {"speculative_config": {"method": "saguaro", "num_speculative_tokens": K, **options}}


@dataclass(frozen=True)
class Round:
    """One row of one exchange, as the draft saw it."""

    request_id: str
    slot: int
    accepted: int
    bonus: int
    length: int
    temperature: float
    ready: int
    verified: int


@dataclass(frozen=True)
class Scripted:
    """What one scenario gave."""

    results: list[Json]
    events: list[tuple[str, int, str, int]]
    rounds: list[Round]
    samplings: dict[str, float]
    metrics: dict[str, float]
    guard: Json
    ranks: list[list[tuple[str, list[int], list[int]]]]

    @property
    def tokens(self) -> list[list[int]]:
        return [result["outputs"][0]["token_ids"] for result in self.results]

    @property
    def accepted(self) -> float:
        return self.metrics["vllm:spec_decode_num_accepted_tokens"]


@dataclass(frozen=True)
class V2Run:
    """What one engine gave."""

    scenarios: dict[str, Scripted]
    answer: Json

    def __getitem__(self, name: str) -> Scripted:
        return self.scenarios[name]


def run_v2(specs: Sequence[Json], **environment: str) -> list[V2Run]:
    """Run all engines, started from one process, and insist that it ended well."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "tests.v2.v2_engine"],
                input=json.dumps({"engines": list(specs)}),
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                env={**environment_at_start(), **ENVIRONMENT, **interpreted.ENVIRONMENT, **environment},
                check=False,
            )
        assert done.returncode == 0, log.read_text(errors="replace")[-6000:]
    return [V2Run({name: _scripted(one) for name, one in a["scenarios"].items()}, a) for a in json.loads(done.stdout)]


def assert_same_arrivals(ours: Scripted, plain: Scripted) -> None:
    """The texts of `v2_plans.ragged` are plain vLLM's; of the one that is aborted as much as both have."""
    expected = {result["key"]: result["outputs"][0]["token_ids"] for result in plain.results}
    assert ours.results
    for result in ours.results:
        key, text = result["key"], result["outputs"][0]["token_ids"]
        if key == "aborted":  # how far it came before it was aborted is chance
            common = min(len(text), len(expected[key]))
            assert common >= 7
            assert text[:common] == expected[key][:common], key
        else:
            assert text == expected[key], key


def _scripted(one: Json) -> Scripted:
    events = [(what, slot, request, tokens) for what, slot, request, tokens in one["events"]]
    return Scripted(**one | {"events": events, "rounds": [Round(*row) for row in one["rounds"]]})
