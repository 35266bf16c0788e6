"""Draw the pictures of the documentation, from measured times and by the project's own functions.

python scripts/pictures.py                                 all of them, into docs/pictures/
python scripts/pictures.py rounds --report REPORT --k 4    one of them, from another report of scripts/bench.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.repository import ROOT
from vllm_saguaro.benchmark.records import Report

REPORT = ROOT / "docs" / "results" / "batches_1_4.json"
OUTPUT = ROOT / "docs" / "pictures"


def rounds(arguments: argparse.Namespace) -> Path:
    """A few rounds of plain decoding, of draft_model and of saguaro, over time."""
    from scripts.illustrations.rounds import draw_rounds, measured

    return draw_rounds(measured(Report.read(arguments.report), arguments.k), arguments.output / "rounds.png")


def outcomes(arguments: argparse.Namespace) -> Path:
    """The outcomes of a round that get a branch."""
    from scripts.illustrations.outcomes import accepted_lengths, draw_outcomes

    lengths = accepted_lengths(Report.read(arguments.report), arguments.k)
    return draw_outcomes(lengths, arguments.branches, arguments.output / "outcomes.png")


def branches(arguments: argparse.Namespace) -> Path:
    """How branches share the KV blocks of their request."""
    from scripts.illustrations.branches import draw_branches

    return draw_branches(arguments.output / "branches.png")


PICTURES: dict[str, Callable[[argparse.Namespace], Path]] = {
    "rounds": rounds,
    "outcomes": outcomes,
    "branches": branches,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    found.add_argument(
        "--report", type=Path, default=REPORT, help=f"measured times (default: {REPORT.relative_to(ROOT)})"
    )
    found.add_argument("--k", type=int, default=4, help="drafts a round (default: 4)")
    found.add_argument("--branches", type=int, default=12, help="outcomes with a branch (default: 12)")
    found.add_argument("--output", type=Path, default=OUTPUT, help=f"folder (default: {OUTPUT.relative_to(ROOT)})")
    return found


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(words)
    try:
        for name in arguments.names or PICTURES:
            if name not in PICTURES:
                raise ValueError(f"there is no picture {name}: write {' or '.join(PICTURES)}")
            print(f"written to {PICTURES[name](arguments)}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"pictures.py: {error}") from error


if __name__ == "__main__":
    main()
