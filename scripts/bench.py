"""Measure saguaro against plain vLLM and vLLM's own draft_model, in turn within one run.

    python scripts/bench.py --k 3 4 6 --target-layers 12 --draft-layers 6
    python scripts/bench.py compare results/before.json results/after.json
    python scripts/bench.py curve --depths 40:2 12:2 12:6 --k 3 4
    python scripts/bench.py plot batches results/small.json results/large.json --plot results/batches.png

What is measured, and how to read the tables: docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.repository import ROOT
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.compare import compare_text
from vllm_saguaro.benchmark.curve import curve_json, curve_text, measure_curve, points_of
from vllm_saguaro.benchmark.options import add_options, depths, settings_from
from vllm_saguaro.benchmark.progress import ProgressBar, say
from vllm_saguaro.benchmark.records import Report, write_json
from vllm_saguaro.benchmark.session import measure
from vllm_saguaro.benchmark.settings import Settings, SettingsError
from vllm_saguaro.benchmark.summary import summarise
from vllm_saguaro.benchmark.tables import report_text

COMMANDS = ("run", "compare", "curve", "plot")
PICTURES = ("batches", "hits", "sweep")
DEPTHS = [(40, 2), (20, 2), (12, 2), (12, 4), (12, 6), (12, 9)]


def run(arguments: argparse.Namespace) -> None:
    """Measure once; print the tables, write the JSON."""
    output = arguments.output or results_path("bench")
    report = measure(settings_from(arguments), ProgressBar(), warn)
    print(report_text(report, summarise(report.runs)))
    report.write(output)
    print(f"\nwritten to {output}")


def compare(arguments: argparse.Namespace) -> None:
    """Print what is different between two reports."""
    print(compare_text(Report.read(arguments.a), Report.read(arguments.b)))


def curve(arguments: argparse.Namespace) -> None:
    """Measure at every depth; print the curve, write JSON and plot after each point: it takes long."""
    from vllm_saguaro.benchmark.plots import plot_curve

    output = arguments.output or results_path("curve")
    plot = arguments.plot or output.with_suffix(".png")

    def done(report: Report, reports: list[Report]) -> None:
        print(report_text(report, summarise(report.runs)), end="\n\n", flush=True)
        write_json(output, curve_json(reports))
        plot_curve([point for each in reports for point in points_of(each)], report.settings, plot)

    reports = measure_curve(settings_from(arguments), arguments.depths, ProgressBar, warn, done)
    print(curve_text([point for each in reports for point in points_of(each)]))
    print(f"\nwritten to {output} and {plot}")


def plot(arguments: argparse.Namespace) -> None:
    """Make a picture of reports that exist; their runs are taken together."""
    from vllm_saguaro.benchmark.plots import PLOTS

    reports = [Report.read(path) for path in arguments.reports]
    first = arguments.reports[0]
    path = arguments.plot or first.with_name(f"{first.stem}_{arguments.kind}.png")
    print(f"written to {PLOTS[arguments.kind](reports, path)}")


def results_path(kind: str) -> Path:
    """Where results go unless a path is given."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return ROOT / "results" / f"{kind}-{stamp}.json"


def warn(text: str) -> None:
    """A warning, as soon as it is known."""
    say(f"warning: {text}")


def parser() -> argparse.ArgumentParser:
    """The command line. `run` may be left out."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help="measure (the default)", description=__doc__, formatter_class=raw)
    add_options(one, Settings())
    one.add_argument("--output", type=Path, metavar="JSON", help="(default: results/bench-<time>.json)")
    one.set_defaults(function=run)

    two = commands.add_parser("compare", help="compare two reports", description=compare.__doc__)
    two.add_argument("a", type=Path, metavar="A.json")
    two.add_argument("b", type=Path, metavar="B.json")
    two.set_defaults(function=compare)

    many = commands.add_parser("curve", help="measure over the cost ratio", description=curve.__doc__)
    add_options(many, Settings())
    many.add_argument(
        "--depths",
        nargs="+",
        type=depths,
        default=DEPTHS,
        metavar="T:D",
        help=f"layers of target and draft (default: {' '.join(f'{t}:{d}' for t, d in DEPTHS)})",
    )
    many.add_argument("--output", type=Path, metavar="JSON", help="(default: results/curve-<time>.json)")
    many.add_argument("--plot", type=Path, metavar="PNG", help="(default: beside the JSON)")
    many.set_defaults(function=curve)

    picture = commands.add_parser("plot", help="pictures of reports", description=plot.__doc__)
    picture.add_argument("kind", choices=PICTURES, help="speed by batch, hit rate by N, or all by a swept key")
    picture.add_argument("reports", nargs="+", type=Path, metavar="REPORT")
    picture.add_argument("--plot", type=Path, metavar="PNG", help="(default: beside the first report)")
    picture.set_defaults(function=plot)
    return top


def with_command(words: list[str]) -> list[str]:
    """`run` put in where no command is named."""
    if words and (words[0] in COMMANDS or words[0] in ("-h", "--help")):
        return words
    return ["run", *words]


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(with_command(sys.argv[1:] if words is None else words))
    try:
        arguments.function(arguments)
    except (SettingsError, WorkerError, OSError, ValueError) as error:
        raise SystemExit(f"bench.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("bench.py: stopped") from None


if __name__ == "__main__":
    main()
