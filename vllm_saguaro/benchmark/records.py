"""What a benchmark is made of: engines, workloads, repetitions, and the report that is written as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("plain", "draft_model", "saguaro")

SCHEMA = 1
"""Version of the JSON format; a reader refuses any other."""


_USUAL_SAMPLING = {"plain": "", "draft_model": "greedy", "saguaro": "coupled"}
"""The `draft_sample_method` that a name does not mention."""


@dataclass(frozen=True)
class Engine:
    """One vLLM engine: what cannot change without loading it anew. All but `mode` only where they apply."""

    mode: str
    k: int = 0
    branches: int | str = 0
    fan_out: str = ""
    sampling: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Short and unique among the engines of a run."""
        parts = [self.mode]
        if self.k:
            parts.append(f"K={self.k}")
        if self.branches:
            parts.append(f"N={self.branches}")
        if self.fan_out:
            parts.append(self.fan_out)
        if self.sampling not in ("", _USUAL_SAMPLING[self.mode]):
            parts.append(self.sampling)
        parts += [f"{key}={as_typed(value)}" for key, value in self.options]
        return " ".join(parts)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Engine:
        """What `asdict` made of one: JSON has lists where an engine has tuples."""
        return cls(**{**data, "options": tuple((key, value) for key, value in data.get("options", ()))})


def as_typed(value: Any) -> str:
    """The value of an option as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Workload:
    """What an engine is asked to do: requests at once, and the temperature and top-p they sample at."""

    batch: int
    temperature: float
    top_p: float = 1.0

    @property
    def name(self) -> str:
        """Short and unique among the workloads of a run."""
        return f"batch {self.batch}, {self.sampling}"

    @property
    def sampling(self) -> str:
        """How its requests sample."""
        return f"T={self.temperature:g}" + ("" if self.top_p == 1 else f", top-p={self.top_p:g}")


@dataclass
class Repetition:
    """One pass of an engine over all prompts.

    `decode_*` leave out what happens until every request of a batch has its first token: the prefill. `rounds` counts
    (request, step) pairs with output in the decode part, `steps` the engine's steps in it; they are equal at batch 1.
    `drafting_seconds` is vLLM's own drafting inside those steps (mode draft_model; 0 elsewhere). `counters` are the
    differences of the metrics over the whole repetition. `foreign_cpu` is the processor time that others took on our
    cores, as a share of the cores' time. `forecasts` is what a `ForecastProbe` counted, with what was believed of them.
    """

    wall_seconds: float
    decode_seconds: float
    tokens: int
    decode_tokens: int
    rounds: int
    steps: int
    drafting_seconds: float
    counters: dict[str, float]
    digests: list[str] = field(default_factory=list)
    same_text: int | None = None
    foreign_cpu: float = 0.0
    forecasts: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Decode tokens per second; of everything where nothing was decoded (one token per request)."""
        if self.decode_tokens:
            return self.decode_tokens / self.decode_seconds
        return self.tokens / self.wall_seconds


@dataclass
class Run:
    """One engine under one workload: all its repetitions."""

    engine: Engine
    workload: Workload
    repetitions: list[Repetition] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Unique in a report, and the same in two reports of the same configuration."""
        return f"{self.engine.name}, {self.workload.name}"


@dataclass
class Report:
    """All that a benchmark found, with where it comes from. `notes` are the warnings that were printed."""

    provenance: dict[str, Any]
    settings: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"this file has format {data.get('schema')!r}, known is {SCHEMA}: is it a report of bench.py?"
            )
        if "servers" in data:
            raise ValueError("this file is a report of servers, whose runs are no engines of ours")
        if "runs" not in data:
            raise ValueError("this file has no runs of its own: is it a curve?")
        runs = [
            Run(
                Engine.from_json(run["engine"]),
                Workload(**run["workload"]),
                [Repetition(**repetition) for repetition in run["repetitions"]],
            )
            for run in data["runs"]
        ]
        others = {name: data[name] for name in ("provenance", "settings", "engines", "notes", "summaries")}
        return cls(runs=runs, **others)

    def write(self, path: Path) -> None:
        """Write the JSON, making the folder if needed."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what `write` wrote."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON that a person can read, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def digest(content: Sequence[int] | str) -> str:
    """A text, or its token ids, in few letters: equal for equal ones, in this run and in another."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
