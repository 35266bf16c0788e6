"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_saguaro.benchmark.forecasts import (
    ACCEPTANCE_BINS,
    CANDIDATES,
    HIT_BINS,
    HITS,
    ORACLE,
    OUTCOMES,
    PREDICTED,
    CalibrationError,
    shares,
)
from vllm_saguaro.benchmark.records import Report, Run
from vllm_saguaro.benchmark.summary import Spread, Summary

NOTHING = "-"


def render(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need to be, the first `left` of them left-aligned, numbers to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]

    def one(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([one(headers), "  ".join("-" * width for width in widths), *map(one, rows)])


def number(value: float | None, digits: int = 2) -> str:
    """A number, or the sign for none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def spread(value: Spread | None, digits: int = 2) -> str:
    """`median [low-high]`, or the one number there is."""
    if value is None:
        return NOTHING
    if value.low == value.high:
        return f"{value.median:.{digits}f}"
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}-{value.high:.{digits}f}]"


def percent(value: float | None) -> str:
    """A share."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    """A time of at least a tenth of a millisecond."""
    return NOTHING if value is None else f"{1e3 * value:.2f}"


def short_time(value: float | None) -> str:
    """A time that may be a few microseconds or many milliseconds."""
    if value is None:
        return NOTHING
    return f"{1e6 * value:.0f} us" if value < 1e-3 else f"{1e3 * value:.2f} ms"


def acceptance(values: Sequence[float]) -> str:
    """The share of rounds in which each draft was accepted: `.80 .59 .42 .30`."""
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values) or NOTHING


def same_text(counted: Sequence[int] | None) -> str:
    """`yes`, or how many of how many."""
    if counted is None:
        return NOTHING
    same, total = counted
    return "yes" if same == total else f"no: {same}/{total}"


@dataclass(frozen=True)
class _Row:
    run: Run
    summary: Summary


def speed_table(runs: Sequence[Run], summaries: dict[str, Summary]) -> str:
    """How fast, how much faster, and whether the text is the same. The runs are those of one workload."""
    headers = ("engine", "tokens/s", "/ plain", "/ draft, same K", "/ draft, best K", "tok/round", "hit rate",
               "target waits", "same text")  # fmt: skip
    rows = [
        (
            row.run.engine.name,
            spread(row.summary.tokens_per_second, 1),
            spread(row.summary.over_plain),
            spread(row.summary.over_same_k),
            spread(row.summary.over_best),
            number(row.summary.tokens_per_round),
            percent(row.summary.hit_rate),
            short_time(row.summary.target_wait_seconds),
            same_text(row.summary.same_text),
        )
        for row in _rows(runs, summaries)
    ]
    return render(headers, rows)


def time_table(runs: Sequence[Run], summaries: dict[str, Summary]) -> str:
    """Where the time goes, and what of the ideal is reached."""
    headers = ("engine", "accepted by position", "step ms", "verify ms", "drafting ms", "c", "draft round ms", "misses",
               "late", "ideal / same K", "reached", "ideal / best K", "reached")  # fmt: skip
    rows = []
    for row in _rows(runs, summaries):
        summary = row.summary
        misses = " ".join(f"{cause}:{value}" for cause, value in sorted(summary.misses.items()) if value)
        rows.append(
            (
                row.run.engine.name,
                acceptance(summary.acceptance),
                milliseconds(summary.step_seconds),
                milliseconds(summary.verify_seconds),
                milliseconds(summary.drafting_seconds),
                number(summary.cost_ratio),
                milliseconds(summary.draft_round_seconds),
                misses or NOTHING,
                str(summary.late_tables) if row.run.engine.mode == "saguaro" else NOTHING,
                number(summary.ideal_over_same_k),
                percent(summary.reached_same_k),
                number(summary.ideal_over_best),
                percent(summary.reached_best),
            )
        )
    return render(headers, rows, left=2)


def forecast_table(runs: Sequence[Run], summaries: dict[str, Summary]) -> str:
    """What N branches hit, were predicted to hit and could have hit, in percent; empty where nobody watched."""
    rows = [row for row in _rows(runs, summaries) if row.summary.forecasts.get(OUTCOMES)]
    if not rows:
        return ""
    kinds = {"measured": HITS, "predicted": PREDICTED, "oracle": ORACLE}
    found = [{kind: shares(row.summary.forecasts, what) for kind, what in kinds.items()} for row in rows]
    sizes = sorted({size for each in found for one in each.values() for size in one})
    headers = ["engine", "hits", *(f"N={size}" for size in sizes), "outcomes", "candidates",
               "error: hits", "noise", "error: acceptance", "noise"]  # fmt: skip
    lines = []
    for row, each in zip(rows, found, strict=True):
        table = row.summary.forecasts
        about = [f"{table[OUTCOMES]:.0f}", _hundredfold(table[CANDIDATES] / table[OUTCOMES])]
        for bins in (HIT_BINS, ACCEPTANCE_BINS):
            error = CalibrationError.of(table, bins)
            about += [_hundredfold(error.error), _hundredfold(error.noise)] if error else [NOTHING, NOTHING]
        name = row.run.engine.name
        for kind, by_size in each.items():
            lines.append((name, kind, *(_hundredfold(by_size.get(size)) for size in sizes), *about))
            name, about = "", [""] * len(about)
    return render(headers, lines, left=2)


def _hundredfold(value: float | None) -> str:
    return NOTHING if value is None else number(100 * value, 1)


def demo_table(runs: Sequence[Run], summaries: dict[str, Summary]) -> str:
    """The few columns that say it all."""
    headers = ("engine", "tokens/s", "ratio", "tokens a round", "hit rate", "target waits", "same text")
    rows = [
        (
            row.run.engine.name,
            number(row.summary.tokens_per_second.median, 1),
            number(row.summary.over_plain.median if row.summary.over_plain else None),
            number(row.summary.tokens_per_round),
            percent(row.summary.hit_rate),
            short_time(row.summary.target_wait_seconds),
            same_text(row.summary.same_text),
        )
        for row in _rows(runs, summaries)
    ]
    return render(headers, rows)


def _rows(runs: Sequence[Run], summaries: dict[str, Summary]) -> list[_Row]:
    return [_Row(run, summaries[run.name]) for run in runs]


def report_text(report: Report, summaries: dict[str, Summary]) -> str:
    """The tables for each workload, with what they were measured on above and the warnings below."""
    about = report.provenance
    settings = report.settings
    git = about["git"]["revision"]
    lines = [
        f"{about['processor']['model']} ({' '.join(about['processor']['flags'])}), vLLM {about['versions']['vllm']}, "
        f"revision {git[:10] if git else 'unknown'}{' with changes' if about['git']['dirty'] else ''}",
        f"target {settings['target']} ({settings['target_layers'] or 'own'} layers), draft {settings['draft']} "
        f"({settings['draft_layers'] or 'own'} layers), {settings['dtype']}{', eager' if settings['eager'] else ''}; "
        f"{settings['prompts']} prompts x {settings['tokens']} tokens, {settings['repetitions']} repetitions: "
        "median [smallest-largest]; decode only",
    ]
    for workload in dict.fromkeys(run.workload for run in report.runs):
        runs = [run for run in report.runs if run.workload == workload]
        lines += ["", f"== {workload.name}", speed_table(runs, summaries), "", time_table(runs, summaries)]
        forecasts = forecast_table(runs, summaries)
        lines += ["", "forecasts, in percent:", forecasts] if forecasts else []
    lines += ["", *(f"warning: {note}" for note in report.notes)] if report.notes else []
    return "\n".join(lines)
