"""Tables of a benchmark of servers, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_saguaro.benchmark.served.records import Report, Run
from vllm_saguaro.benchmark.served.summary import Summary
from vllm_saguaro.benchmark.summary import Spread
from vllm_saguaro.benchmark.tables import acceptance, percent, render, same_text, short_time, spread

_SHOWN = 8
"""Differing texts that are named; all of them are in the JSON."""


def report_text(report: Report, summaries: Mapping[str, Summary]) -> str:
    """What was asked, a table for each load, which texts differ, and the warnings."""
    settings = report.settings
    lines = [
        f"{settings['prompts']} prompts x {settings['tokens']} tokens of {settings['dataset_path']}, "
        f"{settings['repetitions']} repetitions: median [smallest-largest]; the first server is what others are "
        "compared with"
    ]
    for name, server in report.servers.items():
        lines.append(f"{name}: {server['root']} at {server['url']}, vLLM {server['version'] or 'unknown'}")
    for load in dict.fromkeys(run.load for run in report.runs):
        runs = [run for run in report.runs if run.load == load]
        lines += ["", f"== {load.name}", speed_table(runs, summaries)]
        drafts = draft_table(runs, summaries)
        lines += ["", drafts] if drafts else []
        lines += [text for run in runs if (text := _differing(run, summaries[run.name]))]
    lines += ["", *(f"warning: {note}" for note in report.notes)] if report.notes else []
    return "\n".join(lines)


def speed_table(runs: Sequence[Run], summaries: Mapping[str, Summary]) -> str:
    """How fast, how much faster, and whether the greedy texts are the same."""
    headers = ("server", "tokens/s", "/ first", "TTFT ms", "p99", "/ first", "a token ms", "gap p50 ms", "gap p99 ms",
               "same text")  # fmt: skip
    rows = []
    for run in runs:
        found = summaries[run.name]
        rows.append(
            (
                run.server,
                spread(found.tokens_per_second, 1),
                spread(found.over_first),
                _milliseconds(found.first_token),
                _milliseconds(found.first_token_p99),
                spread(found.first_token_over_first),
                _milliseconds(found.token_seconds),
                _milliseconds(found.gap_p50),
                _milliseconds(found.gap_p99),
                same_text(found.same_text),
            )
        )
    return render(headers, rows)


def draft_table(runs: Sequence[Run], summaries: Mapping[str, Summary]) -> str:
    """What drafts were worth, of the servers that say so; empty where none does."""
    headers = ("server", "hit rate", "acceptance", "by position", "misses", "late", "target waits")
    rows = []
    for run in runs:
        found = summaries[run.name]
        if found.acceptance is None and found.hit_rate is None:
            continue
        misses = " ".join(f"{cause}:{value}" for cause, value in sorted(found.misses.items()) if value)
        rows.append(
            (
                run.server,
                percent(found.hit_rate),
                percent(found.acceptance),
                acceptance(found.accepted_by_position),
                misses or "-",
                str(found.late_tables) if found.hit_rate is not None else "-",
                short_time(found.target_wait_seconds),
            )
        )
    return render(headers, rows) if rows else ""


def _differing(run: Run, found: Summary) -> str:
    if not found.differing:
        return ""
    named = ", ".join(f"{at} (from place {place})" for at, place in list(found.differing.items())[:_SHOWN])
    more = len(found.differing) - _SHOWN
    return f"{run.server}: another text for the prompts {named}" + (f" and {more} more" if more > 0 else "")


def _milliseconds(value: Spread | None) -> str:
    return spread(None if value is None else Spread(*(1e3 * each for each in (value.median, value.low, value.high))))
