"""What came back for one request: what became of it, and the texts, kept as token ids and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Fate(StrEnum):
    """What became of a request. Every request must have exactly one, and none may be lost."""

    FINISHED = "finished"
    CLOSED = "closed"
    """We closed the connection, as was planned."""
    REFUSED = "refused"
    """The server said no, with a reason."""
    LOST = "lost"
    """Anything else: an error of the server, a connection that broke, an answer without an end."""


@dataclass(frozen=True)
class Choice:
    """One text, as far as it came. `text` is a digest of it. `finish`, `stop`: vLLM's finish_reason, stop_reason."""

    text: str
    tokens: tuple[int, ...]
    finish: str | None
    stop: str | int | None = None


@dataclass(frozen=True)
class Answer:
    """`reason`: the server's words, or what broke. `complaint`: what is wrong with an answer by itself."""

    index: int
    fate: Fate
    reason: str = ""
    choices: tuple[Choice, ...] = ()
    complaint: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is empty is left out."""
        values: dict[str, Any] = {"index": self.index, "fate": self.fate.value, "seconds": round(self.seconds, 4)}
        if self.reason:
            values["reason"] = self.reason
        if self.complaint:
            values["complaint"] = self.complaint
        if self.choices:
            values["choices"] = [[c.text, list(c.tokens), c.finish, c.stop] for c in self.choices]
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """The inverse of `to_json`; other keys are left alone."""
        choices = tuple(
            Choice(text, tuple(tokens), finish, stop) for text, tokens, finish, stop in data.get("choices", ())
        )
        fate, reason, complaint = Fate(data["fate"]), data.get("reason", ""), data.get("complaint", "")
        return cls(data["index"], fate, reason, choices, complaint, data["seconds"])


def digest(text: str) -> str:
    """Short, and different for different texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
