"""Measure saguaro against plain vLLM and vLLM's own draft_model, in turn within one run.

    python scripts/bench.py --k 3 4 6 --target-layers 12 --draft-layers 6
    python scripts/bench.py compare results/before.json results/after.json
    python scripts/bench.py curve --depths 40:2 12:2 12:6 --k 3 4
    python scripts/bench.py plot batches results/small.json results/large.json --plot results/batches.png

The same as `vllm-saguaro bench`, for a checkout that is not installed; results go to the checkout's results/. What is
measured, and how to read the tables: docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.repository import ROOT
from vllm_saguaro.cli import bench_command
from vllm_saguaro.cli.bench_command import Failure
from vllm_saguaro.cli.usage import UsageError


def parser() -> argparse.ArgumentParser:
    """The command line. `run` may be left out."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_command.add_parts(top)
    top.set_defaults(results=ROOT / "results")
    return top


def with_command(words: list[str]) -> list[str]:
    """`run` put in where no command is named."""
    return bench_command.with_part(words)


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(with_command(sys.argv[1:] if words is None else words))
    try:
        bench_command.do(arguments)
    except (UsageError, Failure) as error:
        raise SystemExit(f"bench.py: {str(error).removeprefix('bench: ')}") from error
    except KeyboardInterrupt:
        raise SystemExit("bench.py: stopped") from None


if __name__ == "__main__":
    main()
