"""`vllm-saguaro bench`: how fast is it here, against plain vLLM and vLLM's draft_model, or server against server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_saguaro.cli.usage import UsageError

EXAMPLES = """examples:
  vllm-saguaro bench --target TARGET --draft DRAFT --prompt-file prompts.jsonl --k 3 4
  vllm-saguaro bench --target TARGET --draft DRAFT --dataset spec_bench --dataset-path question.jsonl --category qa
  vllm-saguaro bench --against-server plain=http://localhost:8000 saguaro=http://localhost:8001 --concurrency 1 4
  vllm-saguaro bench compare before.json after.json
  vllm-saguaro bench curve --depths 40:2 12:6 --k 3 4
  vllm-saguaro bench plot batches small.json large.json --plot batches.png

Without one of the parts it is `run`, with --against-server `servers`; `vllm-saguaro bench run --help` has the options.
Every part takes --json. In a checkout the committed pair needs no --target; elsewhere there is no pair to begin with.
How it measures, and what the columns mean: docs/benchmark.md.
exit codes: 0 it was measured; 1 an engine or a server failed; 2 the question was wrong; 130 stopped"""

PARTS = ("run", "servers", "compare", "curve", "plot")
PICTURES = ("batches", "hits", "sweep")
Part = Callable[[argparse.Namespace], None]


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "bench",
        help="how fast is it here, engine against engine or server against server",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_parts(command)
    command.set_defaults(run=run, results=Path("results"))


def with_part(words: Sequence[str]) -> list[str]:
    """The words after `bench`, with the part put in where none is named."""
    if words and (words[0] in PARTS or words[0] in ("-h", "--help")):
        return list(words)
    against = any(word.partition("=")[0] == "--against-server" for word in words)
    return ["servers" if against else "run", *words]


def add_parts(parser: argparse.ArgumentParser) -> None:
    """`run`, `servers`, `compare`, `curve`, `plot`, each with its function as `part`."""
    from vllm_saguaro.benchmark import options
    from vllm_saguaro.benchmark.served import options as served_options
    from vllm_saguaro.benchmark.settings import Settings

    parts = parser.add_subparsers(dest="named_part", required=True, metavar="PART")

    one = _part(parts, "run", "measure engines (the default)")
    options.add_options(one, Settings())
    one.add_argument("--output", type=Path, metavar="JSON", help="(default: results/bench-<time>.json)")

    served = _part(parts, "servers", "measure servers that run (with --against-server the default)")
    served_options.add_options(served)
    served.add_argument("--output", type=Path, metavar="JSON", help="(default: results/servers-<time>.json)")

    two = _part(parts, "compare", "compare two reports of engines")
    two.add_argument("a", type=Path, metavar="A.json")
    two.add_argument("b", type=Path, metavar="B.json")

    many = _part(parts, "curve", "measure over the cost ratio")
    options.add_options(many, Settings())
    options.add_depths(many)
    many.add_argument("--output", type=Path, metavar="JSON", help="(default: results/curve-<time>.json)")
    many.add_argument("--plot", type=Path, metavar="PNG", help="(default: beside the JSON)")

    picture = _part(parts, "plot", "pictures of reports")
    picture.add_argument("kind", choices=PICTURES, help="speed by batch, hit rate by N, or all by a swept key")
    picture.add_argument("reports", nargs="+", type=Path, metavar="REPORT")
    picture.add_argument("--plot", type=Path, metavar="PNG", help="(default: beside the first report)")


def run(arguments: argparse.Namespace) -> int:
    """Do the part; 1 where an engine or a server failed."""
    try:
        do(arguments)
    except Failure as problem:
        print(f"vllm-saguaro: bench: {problem}", file=sys.stderr)
        return 1
    return 0


class Failure(Exception):
    """An engine or a server failed while it was measured."""


def do(arguments: argparse.Namespace) -> None:
    """Do the part. Raises UsageError for a question that was wrong, Failure for an answer that did not come."""
    from vllm_saguaro.benchmark.client import WorkerError
    from vllm_saguaro.cli import bench_parts

    part: Part = getattr(bench_parts, arguments.named_part)
    failures: tuple[type[Exception], ...] = (WorkerError,)
    if arguments.named_part == "servers":
        from vllm_saguaro.benchmark.served.client import ServerError

        failures = (ServerError,)
    try:
        part(arguments)
    except failures as error:
        raise Failure(str(error)) from error
    except ImportError as error:
        raise UsageError(f"bench: {error}: pip install {error.name or 'it'}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"bench: {error}") from error


def _part(parts: Any, name: str, text: str) -> argparse.ArgumentParser:
    part: argparse.ArgumentParser = parts.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    part.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return part
