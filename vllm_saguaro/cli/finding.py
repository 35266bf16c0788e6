"""What doctor says: one line a thing looked at, with what to do where it is not well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

_COLON: Final = re.compile(r'(?<!"): |(?<="): (?!["{\[\d]|true|false)')
"""Not the one between a key and its value, in what a user is to write."""


class Level(StrEnum):
    """How bad it is. Only an error keeps the method from running."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject` is what was looked at, `text` what was found, `advice` what to do about it (empty: nothing)."""

    level: Level
    subject: str
    text: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def ok(subject: str, text: str, advice: str = "") -> Finding:
    """All is well; `advice` is for who wants something else."""
    return Finding(Level.OK, subject, text, advice)


def warning(subject: str, text: str, advice: str) -> Finding:
    """It runs, but not as well as it could, or something could not be looked at."""
    return Finding(Level.WARNING, subject, text, advice)


def error(subject: str, text: str, advice: str) -> Finding:
    """It does not run like this."""
    return Finding(Level.ERROR, subject, text, advice)


def refused(subject: str, message: str) -> Finding:
    """An error from one of our own checks: its one line says what is wrong and, after the last ": " or "; ", what to
    write instead."""
    colons = list(_COLON.finditer(message))
    if not colons:
        wrong, _, advice = message.rpartition("; ")
        return error(subject, wrong or message, advice if wrong else "")
    return error(subject, message[: colons[-1].start()], message[colons[-1].end() :])


def as_text(findings: Sequence[Finding]) -> str:
    """A table for a person: level, subject, text; the advice below."""
    wide = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:<8} {finding.subject:<{wide}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{wide}}  -> {finding.advice}")
    return "\n".join(lines)
