"""A real `vllm serve` with saguaro, asked many things of many kinds while its draft is killed now and then.

    python scripts/soak.py --requests 300 --kills 3                  a few minutes
    python scripts/soak.py --state results/soak.jsonl --minutes 30   20,000 requests and 100 kills, half an hour of it

The same command goes on where the last one stopped, until all is done. Exit status: 0 all is well, 1 something is
wrong, 2 a wrong option, 3 well so far, but not finished. What is checked: docs/soak.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.repository import ROOT
from scripts.soaking.journal import Journal
from scripts.soaking.pair import add_pair_options
from scripts.soaking.report import report_json, report_text
from scripts.soaking.server import ServerError
from scripts.soaking.session import sit
from scripts.soaking.settings import KINDS, Settings
from vllm_saguaro.benchmark.progress import say
from vllm_saguaro.benchmark.records import write_json
from vllm_saguaro.benchmark.settings import SettingsError

FAILED, WRONG_OPTION, UNFINISHED = 1, 2, 3


def fault_count(text: str) -> tuple[str, int]:
    """KIND=COUNT."""
    kind, equals, count = text.partition("=")
    if kind not in KINDS or not equals or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write KIND=COUNT, KIND one of {', '.join(KINDS)}")
    return kind, int(count)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = Settings()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--requests", type=int, default=defaults.requests, help="(default: 20000)")
    found.add_argument("--kills", type=int, default=100, help="times that the draft process is killed (default: 100)")
    found.add_argument(
        "--faults",
        nargs="+",
        type=fault_count,
        default=[],
        metavar="KIND=COUNT",
        help="other things to do to it: stop (SIGSTOP), oom (no more memory), slow (stopped in short turns)",
    )
    found.add_argument("--seed", type=int, default=defaults.seed, help="of the traffic and of the faults (default: 0)")
    found.add_argument(
        "--concurrency", type=int, default=defaults.concurrency, help=f"at once (default: {defaults.concurrency})"
    )
    found.add_argument(
        "--warm-up",
        type=int,
        default=defaults.warm_up,
        metavar="REQUESTS",
        help=f"after which memory is looked at for the first time (default: {defaults.warm_up})",
    )
    found.add_argument("--placement", help="where the draft works, see docs/options.md")
    add_pair_options(found, defaults)
    found.add_argument(
        "--state", type=Path, metavar="JSONL", help="go on with this run (default: a new one in results/)"
    )
    found.add_argument("--minutes", type=float, help="send nothing more after so long")
    found.add_argument(
        "--compare-now",
        action="store_true",
        help="send nothing more to saguaro this time: compare what has been answered with plain vLLM's answers",
    )
    found.add_argument("--report", type=Path, metavar="JSON", help="(default: beside the state)")
    return found


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Checked. Raises `SettingsError`."""
    options = dict(arguments.option)
    if arguments.placement is not None:
        options["placement"] = arguments.placement
    faults = dict(arguments.faults)
    if "kill" in faults:
        raise SettingsError("--faults kill: write --kills")
    settings = Settings(
        target=arguments.target.resolve(),
        prompt_file=arguments.prompt_file,
        requests=arguments.requests,
        faults={"kill": arguments.kills} | faults,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
        options=options,
        warm_up=min(arguments.warm_up, arguments.requests // 4),
    )
    settings.check()
    return settings


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(words)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    state = arguments.state or ROOT / "results" / f"soak-{stamp}.jsonl"
    try:
        settings = settings_from(arguments)
        journal = Journal(state, settings.to_json())
    except (SettingsError, OSError) as error:
        say(f"soak.py: {error}")
        raise SystemExit(WRONG_OPTION) from error
    try:
        accounts = asyncio.run(sit(settings, journal, arguments.minutes, say, arguments.compare_now))
    except ServerError as error:
        raise SystemExit(f"soak.py: {error}") from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("soak.py: stopped; what was in flight will be asked again") from None
    finally:
        journal.close()
    print(report_text(settings, accounts, journal))
    output = arguments.report or state.with_suffix(".report.json")
    write_json(output, report_json(settings, accounts, journal))
    print(f"\nstate {state}\nreport {output}")
    if accounts.failures:
        raise SystemExit(FAILED)
    if not accounts.finished:
        raise SystemExit(UNFINISHED)


if __name__ == "__main__":
    main()
