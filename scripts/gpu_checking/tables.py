"""The short table at the end of a check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.gpu_checking.judgement import acceptance, hit_rate

Json = dict[str, Any]


def speed_table(report: Json) -> str:
    """Tokens a second by engine, batch and temperature, with what the drafts were worth; each row is one cell."""
    found = {section["name"]: section["answer"] for section in report["sections"]}
    settings = report["settings"]
    rows = [("T", "batch", "engine", "tokens/s", "vs plain", "tokens/step", "accepted/round", "hits")]
    for t in settings["temperatures"]:
        for batch in settings["batches"]:
            plain = _rate(found.get(f"plain: batch {batch}, T = {t:g}"))
            for mode in settings["modes"]:
                answer = found.get(f"{mode}: batch {batch}, T = {t:g}")
                rate = _rate(answer)
                if not answer or rate is None:
                    continue
                rows.append(
                    (
                        f"{t:g}",
                        str(batch),
                        mode,
                        f"{rate:.0f}",
                        _number(rate / plain if plain else None),
                        _number(answer["tokens"] / answer["steps"] if answer["steps"] else None),
                        _number(acceptance(answer)),
                        _number(hit_rate(answer)),
                    )
                )
    return _aligned(rows)


def failures(report: Json) -> str:
    """All complaints, one line each."""
    return "\n".join(
        f"FAILED {section['name']}: {complaint}"
        for section in report["sections"]
        for complaint in section["complaints"]
    )


def _rate(answer: Json | None) -> float | None:
    return answer["tokens"] / answer["seconds"] if answer and answer["seconds"] else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
