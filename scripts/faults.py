"""The table of faults: a real `vllm serve` with saguaro, a steady number of streams, and one fault after the other.

    python scripts/faults.py                                  all there are: a draft process, a Ray actor, two Ray nodes
    python scripts/faults.py --placement process --only kill hang

For each fault: requests in flight, requests lost, the longest gap between two pieces of any stream (and the longest
in a quiet time before), seconds until drafts hit again, restarts. Exit status: 0 all is well, 1 a request was lost, a
text is not plain vLLM's, hits did not return or something was left, 2 a wrong option. More: docs/faults.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.faulting.nodes import ClusterError
from scripts.faulting.report import failures, report_json, report_text
from scripts.faulting.session import measure
from scripts.faulting.settings import KINDS_OF, Kind, Settings
from scripts.repository import ROOT
from scripts.soaking.pair import add_pair_options
from scripts.soaking.server import ServerError
from vllm_saguaro.benchmark import provenance
from vllm_saguaro.benchmark.progress import say
from vllm_saguaro.benchmark.records import write_json
from vllm_saguaro.benchmark.settings import SettingsError, allowed_cores

FAILED, WRONG_OPTION = 1, 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = Settings()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--placement",
        nargs="+",
        choices=KINDS_OF,
        default=defaults.placements,
        help="where the draft is: process, ray (an actor on this node), nodes (an actor on another node, both on this "
        "machine); a server each (default: all)",
    )
    found.add_argument(
        "--only",
        nargs="+",
        choices=[str(kind) for kind in Kind],
        default=(),
        metavar="FAULT",
        help="; ".join(f"{placement}: {' '.join(kinds)}" for placement, kinds in KINDS_OF.items()) + " (default: all)",
    )
    found.add_argument(
        "--seconds",
        type=float,
        default=defaults.seconds,
        help=f"of quiet before each fault, in which gaps are looked at, too (default: {defaults.seconds:g})",
    )
    found.add_argument(
        "--concurrency", type=int, default=defaults.concurrency, help=f"streams at once ({defaults.concurrency})"
    )
    found.add_argument("--seed", type=int, default=defaults.seed, help="of the requests (default: 0)")
    add_pair_options(found, defaults)
    found.add_argument("--output", type=Path, metavar="JSON", help="(default: results/faults-DATE.json)")
    return found


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Checked. Raises `SettingsError`."""
    settings = Settings(
        target=arguments.target.resolve(),
        prompt_file=arguments.prompt_file,
        placements=tuple(dict.fromkeys(arguments.placement)),
        only=tuple(map(Kind, arguments.only)),
        seconds=arguments.seconds,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        options=dict(arguments.option),
    )
    settings.check()
    return settings


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(words)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    output = arguments.output or ROOT / "results" / f"faults-{stamp}.json"
    try:
        settings = settings_from(arguments)
        output.parent.mkdir(parents=True, exist_ok=True)
    except (SettingsError, OSError) as error:
        say(f"faults.py: {error}")
        raise SystemExit(WRONG_OPTION) from error
    about = provenance.collect(allowed_cores())
    logs = output.with_suffix(".logs")
    logs.mkdir(exist_ok=True)
    try:
        runs, texts = asyncio.run(measure(settings, logs, say))
    except (ServerError, ClusterError) as error:
        raise SystemExit(f"faults.py: {error}") from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("faults.py: stopped") from None
    text = report_text(settings, about, runs, texts)
    output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    write_json(output, report_json(settings, about, runs, texts))
    print(f"{text}\n\n{output}")
    if failures(runs, texts):
        raise SystemExit(FAILED)


if __name__ == "__main__":
    main()
