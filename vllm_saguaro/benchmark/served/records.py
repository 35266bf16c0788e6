"""What a benchmark of servers is made of, and the report that is written as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
KIND = "servers"
"""What sets these reports apart from those of engines."""


@dataclass(frozen=True)
class Load:
    """How many requests are under way at any time, and the temperature they sample at."""

    concurrency: int
    temperature: float

    @property
    def name(self) -> str:
        """Short and unique in a report."""
        return f"{self.concurrency} at once, T={self.temperature:g}"


@dataclass(frozen=True)
class Answer:
    """One request. Times are seconds; `first` from sending it to its first token, `gaps` between two pieces of the
    stream, `seconds` to its last token. `tokens`: token ids where the server sends them, else None."""

    text: str
    count: int
    first: float
    seconds: float
    gaps: tuple[float, ...] = ()
    tokens: tuple[int, ...] | None = None

    @property
    def of_a_token(self) -> float | None:
        """Seconds a token after the first one; None for a text of one token."""
        return (self.seconds - self.first) / (self.count - 1) if self.count > 1 else None

    @property
    def content(self) -> tuple[int, ...] | str:
        """What is compared: token ids where there are some."""
        return self.text if self.tokens is None else self.tokens


@dataclass
class Repetition:
    """One pass of a server over all prompts.

    `wall_seconds`: first request to last token. `counters`: what the server counted meanwhile (empty where it does not
    say). `differing`: prompts, by place, whose greedy text is not that of the first server, with the place of the first
    token (where there are no ids: character) that is another; None where nothing is compared.
    """

    wall_seconds: float
    tokens: int
    first_token_seconds: list[float]
    gap_seconds: list[float]
    token_seconds: list[float]
    digests: list[str]
    counters: dict[str, float] = field(default_factory=dict)
    differing: dict[int, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, prefill included."""
        return self.tokens / self.wall_seconds


@dataclass
class Run:
    """One server under one load: all its repetitions."""

    server: str
    load: Load
    repetitions: list[Repetition] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Unique in a report."""
        return f"{self.server}, {self.load.name}"


@dataclass
class Report:
    """All that was found, with where it comes from. `servers`: what each says of itself, by name."""

    provenance: dict[str, Any]
    settings: dict[str, Any]
    servers: dict[str, dict[str, Any]]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {"schema": SCHEMA, "kind": KIND, **dataclasses.asdict(self)}
