"""The short tables at the end of a check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.gpu_checking.cells import acceptance, hit_rate, rate, ratio, speeds
from scripts.gpu_checking.settings import PROCESS

Json = dict[str, Any]


def speed_table(report: Json) -> str:
    """Tokens a second by pair, engine, batch and temperature, with what the drafts were worth; each row is one cell."""
    settings, found = report["settings"], speeds(report["sections"])
    head = ("pair", "T", "batch", "engine", "tokens/s", "vs plain", "vs draft_model")
    rows: list[tuple[str, ...]] = [(*head, "tokens/step", "accepted/round", "hits")]
    for pair in (settings["pair"], *settings["also"]):
        for t in settings["temperatures"]:
            for batch in settings["batches"]:
                for mode in settings["modes"]:
                    answer = found.get((pair, mode, batch, t))
                    speed = rate(answer)
                    if not answer or speed is None:
                        continue
                    others = [found.get((pair, other, batch, t)) for other in ("plain", "draft_model")]
                    rows.append(
                        (
                            pair,
                            f"{t:g}",
                            str(batch),
                            mode,
                            f"{speed:.0f}",
                            *(_number(ratio(answer, other)) for other in others),
                            _number(answer["tokens"] / answer["steps"] if answer["steps"] else None),
                            _number(acceptance(answer)),
                            _number(hit_rate(answer)),
                        )
                    )
    return _aligned(rows)


def goal_table(report: Json) -> str:
    """What was promised, what was found, and which of it is kept."""
    words = {True: "met", False: "MISSED", None: "not judged: these are a CPU's times"}
    rows = [("goal", "wanted", "found", "")]
    for each in report["goals"]:
        verdict = words[each["met"]] if each["found"] is not None else "not measured"
        found = "-" if each["found"] is None else f"{each['found']:g}"
        rows.append((each["goal"], each["wanted"], found, verdict))
    lines = [_aligned(rows, left=(0, 3))]
    settings = report["settings"]
    if PROCESS not in settings["modes"]:
        lines.append(f"{PROCESS} was not run: it needs a second GPU, and {settings['gpus']} is visible")
    return "\n".join(lines)


def failures(report: Json) -> str:
    """All complaints, one line each."""
    return "\n".join(
        f"FAILED {section['name']}: {complaint}"
        for section in report["sections"]
        for complaint in section["complaints"]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns to the right, but for those that are named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def placed(cell: str, column: int) -> str:
        return cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])

    return "\n".join("  ".join(placed(cell, number) for number, cell in enumerate(row)).rstrip() for row in rows)
