"""`vllm-saguaro watch`: what the draft side of a running server is worth just now, from its /metrics."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.usage import UsageError

if TYPE_CHECKING:
    from vllm_saguaro.cli.reading import Reading

EXAMPLES = """examples:
  vllm-saguaro watch http://localhost:8000              a view that renews itself every two seconds
  vllm-saguaro watch http://localhost:8000 --once       all since the server's start, once
  vllm-saguaro watch http://localhost:8000 --json       one JSON object a line, for a script

C of Saguaro sampling is chosen on the draft side and is in its log, not among the metrics.
exit codes: 0 it was read; 1 no answer, or no metrics of ours in it; 2 the question was wrong; 130 stopped"""
_TIMEOUT: Final = 10.0
_HOME_AND_CLEAR: Final = "\x1b[H\x1b[J"
_BAR: Final = 30


class NoAnswer(Exception):
    """The server cannot be read; one line."""


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "watch",
        help="what a running server's drafts are worth just now",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("url", metavar="URL", help="the server, like http://localhost:8000")
    command.add_argument("--once", action="store_true", help="since the server's start, and end")
    command.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="(default: %(default)s)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read and show, once or until stopped."""
    from vllm_saguaro.cli.reading import read, uses_saguaro

    if arguments.interval <= 0:
        raise UsageError(f"watch: --interval is {arguments.interval:g}: write seconds, more than 0")
    url = metrics_url(arguments.url)
    try:
        before = fetch(url)
    except NoAnswer as problem:
        return _say_no(str(problem))
    if not uses_saguaro(before):
        return _say_no(
            f"{url} has no vllm:saguaro_* metrics: start the server with --speculative-config saguaro, and one API "
            "server process"
        )
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


def metrics_url(url: str) -> str:
    """The address of the metrics of a server. Raises UsageError for what is none."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"watch: {url!r} is no address of a server: write one like http://localhost:8000")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/metrics") else f"{path}/metrics").geturl()


def fetch(url: str) -> Snapshot:
    """Read the metrics. Raises NoAnswer."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return Snapshot(answer.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise NoAnswer(f"{url} does not answer ({getattr(error, 'reason', error)})") from error


def view(reading: Reading, url: str) -> str:
    """The reading for a person, some lines of up to 80 columns."""
    span = "since the server's start" if reading.seconds is None else f"the last {reading.seconds:.1f} s"
    speed = ""
    if reading.tokens_per_second is not None:
        speed = f"{reading.tokens_per_second:.1f} tokens/s, {reading.steps_per_second or 0:.1f} steps/s, "
    causes = ", ".join(f"{cause.replace('_', ' ')} {_of(n, reading.outcomes)}" for cause, n in reading.misses.items())
    backups = ", ".join(f"{kind} {count}" for kind, count in reading.backups.items())
    by_position = " ".join(f"{share:.2f}" for share in reading.accepted_by_position) or "-"
    up = f"{reading.drafts_up} up"
    if reading.drafts_left_off:
        up += f", {reading.drafts_left_off} given up"
    if reading.restarts:
        up += f", {reading.restarts} restarts"
    return "\n".join(
        [
            f"saguaro at {url}, {span}",
            f"{speed}{reading.running} running, {reading.waiting} waiting; drafts: {up}",
            "",
            f"hit rate        {_bar(reading.hit_rate)}  of {reading.outcomes} outcomes",
            f"acceptance      {_bar(reading.acceptance)}  of the drafts verified",
            f"  by position   {by_position}",
            f"misses          {causes}",
            f"backups         {backups}",
            f"late tables     {_percent(reading.late_share)} of the hits",
            f"quiet steps     {_percent(reading.quiet_share)}",
            f"chosen now      K = {reading.chosen_k:g}, N = {reading.chosen_n:g}",
            f"draft round     {_time(reading.draft_round)}   verify {_time(reading.verify)}",
            f"target waits    {_time(reading.target_wait)}   99 % below {_time(reading.target_wait_p99)}; "
            f"for backups {_time(reading.backup_wait)}",
        ]
    )


def _show(reading: Reading, url: str, as_json: bool, live: bool) -> None:
    if as_json:
        print(json.dumps(reading.to_json()), flush=True)
    else:
        print(f"{_HOME_AND_CLEAR if live else ''}{view(reading, url)}\n", flush=True)


def _say_no(problem: str) -> int:
    print(f"vllm-saguaro: {problem}", file=sys.stderr)
    return 1


def _bar(share: float | None) -> str:
    filled = round(_BAR * min(1.0, max(0.0, share or 0.0)))
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {_percent(share):>6}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _of(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"
