"""What `vllm-saguaro bench` and `scripts/bench.py` do: measure, compare, draw. Each prints its answer."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark.compare import compare_json, compare_text
from vllm_saguaro.benchmark.curve import curve_json, curve_text, measure_curve, points_of
from vllm_saguaro.benchmark.options import settings_from
from vllm_saguaro.benchmark.progress import ProgressBar, say
from vllm_saguaro.benchmark.records import Report, write_json
from vllm_saguaro.benchmark.session import measure
from vllm_saguaro.benchmark.summary import summarise
from vllm_saguaro.benchmark.tables import report_text


def run(arguments: argparse.Namespace) -> None:
    """Measure engines once; print the tables, write the JSON."""
    report = measure(settings_from(arguments), ProgressBar(), warn)
    _give(arguments, report.to_json(), lambda: report_text(report, summarise(report.runs)), "bench")


def servers(arguments: argparse.Namespace) -> None:
    """Measure servers that run; print the tables, write the JSON."""
    from vllm_saguaro.benchmark.served import options, session, summary, tables

    report = session.measure(options.settings_from(arguments), ProgressBar(), warn)
    _give(arguments, report.to_json(), lambda: tables.report_text(report, summary.summarise(report.runs)), "servers")


def compare(arguments: argparse.Namespace) -> None:
    """Print what is different between two reports."""
    first, second = Report.read(arguments.a), Report.read(arguments.b)
    print(json.dumps(compare_json(first, second), indent=1) if arguments.json else compare_text(first, second))


def curve(arguments: argparse.Namespace) -> None:
    """Measure at every depth; print the curve, write JSON and plot after each point: it takes long."""
    from vllm_saguaro.benchmark.plots import plot_curve

    output = arguments.output or results_path(arguments.results, "curve")
    plot = arguments.plot or output.with_suffix(".png")

    def done(report: Report, reports: list[Report]) -> None:
        if not arguments.json:
            print(report_text(report, summarise(report.runs)), end="\n\n", flush=True)
        write_json(output, curve_json(reports))
        plot_curve([point for each in reports for point in points_of(each)], report.settings, plot)

    reports = measure_curve(settings_from(arguments), arguments.depths, ProgressBar, warn, done)
    if arguments.json:
        print(json.dumps(curve_json(reports), indent=1))
        return
    print(curve_text([point for each in reports for point in points_of(each)]))
    print(f"\nwritten to {output} and {plot}")


def plot(arguments: argparse.Namespace) -> None:
    """Make a picture of reports that exist; their runs are taken together."""
    from vllm_saguaro.benchmark.plots import PLOTS

    reports = [Report.read(path) for path in arguments.reports]
    first = arguments.reports[0]
    path = PLOTS[arguments.kind](reports, arguments.plot or first.with_name(f"{first.stem}_{arguments.kind}.png"))
    print(json.dumps({"plot": str(path)}) if arguments.json else f"written to {path}")


def results_path(folder: Path, kind: str) -> Path:
    """Where results go unless a path is given."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return folder / f"{kind}-{stamp}.json"


def warn(text: str) -> None:
    """A warning, as soon as it is known."""
    say(f"warning: {text}")


def _give(arguments: argparse.Namespace, report: dict[str, Any], text: Any, kind: str) -> None:
    """The tables and a file; or the JSON, and a file only where one is named."""
    output = arguments.output
    if output is None and not arguments.json:
        output = results_path(arguments.results, kind)
    if output is not None:
        write_json(output, report)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{text()}\n\nwritten to {output}")
