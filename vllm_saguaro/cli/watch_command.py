"""`vllm-saguaro watch`: what the draft side of a running server is worth just now, from its /metrics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm_saguaro.cli.usage import UsageError

if TYPE_CHECKING:
    from vllm_saguaro.cli.reading import Reading
    from vllm_saguaro.cli.wording import Row

EXAMPLES = """examples:
  vllm-saguaro watch http://localhost:8000              a view that renews itself every two seconds
  vllm-saguaro watch http://localhost:8000 --once       all since the server's start, once
  vllm-saguaro watch http://localhost:8000 --json       one JSON object a line, for a script
  vllm-saguaro watch http://localhost:8000 --web        a page with moving plots, for a browser on this machine
  vllm-saguaro watch http://localhost:8000 --web 8080 --trace /tmp/rounds.json
                                                        at that port, with a timeline of the last rounds

Chosen now: K and N; and C of Saguaro sampling where drafts are drawn from the draft's own q.
exit codes: 0 it was read; 1 no answer, or no metrics of ours in it; 2 the question was wrong; 130 stopped"""
_HOME_AND_CLEAR: Final = "\x1b[H\x1b[J"
_BAR: Final = 30
_ANY_PORT: Final = "0"


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "watch",
        help="what a running server's drafts are worth just now",
        # URL first: what follows --web would be taken for its port.
        usage="vllm-saguaro watch URL [--once] [--json] [--interval SECONDS] [--web [[HOST:]PORT]] [--trace FILE]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("url", metavar="URL", help="the server, like http://localhost:8000")
    command.add_argument("--once", action="store_true", help="since the server's start, and end")
    command.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="(default: %(default)s)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument(
        "--web",
        nargs="?",
        const=_ANY_PORT,
        metavar="[HOST:]PORT",
        help="serve a page for a browser, at 127.0.0.1 and a free port unless said otherwise",
    )
    command.add_argument(
        "--trace", type=Path, metavar="FILE", help='the page shows rounds from it: what the option "trace" writes'
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read and show, once or until stopped."""
    from vllm_saguaro.cli.metrics_source import metrics_url

    if not arguments.interval > 0:
        raise UsageError(f"watch: --interval is {arguments.interval:g}: write seconds, more than 0")
    url = metrics_url(arguments.url)
    if arguments.web is not None:
        return _serve(arguments, url)
    if arguments.trace is not None:
        raise UsageError("watch: --trace is for the page: write --web too")
    return _follow(arguments, url)


def _serve(arguments: argparse.Namespace, url: str) -> int:
    from vllm_saguaro.cli.watch_page import address, serve

    if arguments.once or arguments.json:
        raise UsageError("watch: --web serves a page: leave out --once and --json (the page has /readings.json)")
    if arguments.trace is not None and arguments.trace.is_dir():
        raise UsageError(f"watch: --trace {arguments.trace} is a folder: write the file that the server writes")
    return serve(*address(arguments.web), url, arguments.interval, arguments.trace)


def _follow(arguments: argparse.Namespace, url: str) -> int:
    from vllm_saguaro.cli.history import NOT_OURS
    from vllm_saguaro.cli.metrics_source import NoAnswer, fetch
    from vllm_saguaro.cli.reading import read, uses_saguaro

    try:
        before = fetch(url)
    except NoAnswer as problem:
        return _say_no(str(problem))
    if not uses_saguaro(before):
        return _say_no(NOT_OURS.format(url=url))
    if arguments.once:
        _show(read(before), url, arguments.json, live=False)
        return 0
    _show(read(before), url, arguments.json, live=sys.stdout.isatty())
    since = time.monotonic()
    while True:
        time.sleep(arguments.interval)
        try:
            now = fetch(url)
        except NoAnswer as problem:
            print(f"vllm-saguaro: {problem}; trying again", file=sys.stderr)
            continue
        at = time.monotonic()
        _show(read(now, before, at - since), url, arguments.json, live=sys.stdout.isatty())
        before, since = now, at


def view(reading: Reading, url: str) -> str:
    """The reading for a person, some lines of up to 80 columns."""
    from vllm_saguaro.cli.wording import rows, span

    row = {row.key: row for row in rows(reading)}
    speed = f"{row['speed'].value}, {row['speed'].more}, " if "speed" in row else ""
    up = ", ".join(filter(None, (row["drafts"].value, row["drafts"].more)))
    lines = [
        f"saguaro at {url}, {span(reading)}",
        f"{speed}{row['requests'].value}, {row['requests'].more}; drafts: {up}",
        "",
        *(_line(row[key], bar=True) for key in ("hit_rate", "acceptance")),
        f"  {_line(row['by_position'], width=14)}",
        *(_line(row[key]) for key in ("misses", "backups", "late", "quiet", "chosen")),
        f"{_line(row['draft_round'])}   verify {row['verify'].value}",
        f"{_line(row['waits'])}",
    ]
    return "\n".join(lines)


def _show(reading: Reading, url: str, as_json: bool, live: bool) -> None:
    if as_json:
        print(json.dumps(reading.to_json()), flush=True)
    else:
        print(f"{_HOME_AND_CLEAR if live else ''}{view(reading, url)}\n", flush=True)


def _say_no(problem: str) -> int:
    print(f"vllm-saguaro: {problem}", file=sys.stderr)
    return 1


def _line(row: Row, width: int = 16, bar: bool = False) -> str:
    filled = round(_BAR * min(1.0, max(0.0, row.share or 0.0)))
    value = f"[{'#' * filled}{'.' * (_BAR - filled)}] {row.value:>6}" if bar else row.value
    return f"{row.name:<{width}}{value}{'  ' if row.more else ''}{row.more}"
