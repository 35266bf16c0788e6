"""The `vllm-saguaro` command: what is asked for, and the exit code. Each command imports what it needs when it runs.

Exit codes: 0 all is well, 1 the answer is bad (doctor found an error, a server does not answer), 2 the question was
wrong (unknown option, unreadable file), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_saguaro import __version__
from vllm_saguaro.cli import bench_command, doctor_command, simulate_command, tune_command, watch_command
from vllm_saguaro.cli.usage import UsageError

DESCRIPTION = """Speculative speculative decoding (SSD / Saguaro) for vLLM: whether it will run, what it would gain,
what it is doing now."""

EXAMPLES = """examples:
  vllm-saguaro doctor                              what this machine and this vLLM allow
  vllm-saguaro doctor TARGET DRAFT                 and whether these two models fit, before any weights load
  vllm-saguaro tune TARGET DRAFT                   which K, N, backup and placement are best here: a file to serve with
  vllm-saguaro simulate --world llama-70b          AR, SD, SSD and ours on four H100s and one more
  vllm-saguaro bench --against-server plain=http://localhost:8000 saguaro=http://localhost:8001
  vllm-saguaro watch http://localhost:8000         hit rate, acceptance and misses of a running server

K: drafts a round; N: predicted outcomes that get drafts
AR, SD, SSD, ours: plain decoding, ordinary speculation, the engine of the paper, saguaro
`vllm-saguaro COMMAND --help` has more. Every command takes --json.
exit codes: 0 all is well; 1 the answer is bad; 2 the question was wrong; 130 stopped"""

BAD_QUESTION = 2
STOPPED = 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="vllm-saguaro",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vllm-saguaro {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (doctor_command, tune_command, simulate_command, bench_command, watch_command):
        command.add_to(commands)
    return top


def completed(words: Sequence[str]) -> list[str]:
    """The words with what may be left out of them."""
    return ["bench", *bench_command.with_part(words[1:])] if words[:1] == ["bench"] else list(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Called with the words of the command line, without the program's name."""
    given = list(sys.argv[1:] if words is None else words)
    # What follows "--" is for vLLM's own parser: argparse itself would take it for further positionals.
    own, beyond = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    try:
        arguments, left = parser().parse_known_args(completed(own))
    except SystemExit as stop:  # argparse has said what was wrong, or printed the help
        return int(stop.code or 0)
    if beyond and arguments.command not in ("doctor", "tune"):
        print(f"vllm-saguaro: {arguments.command} takes nothing after --: leave it out", file=sys.stderr)
        return BAD_QUESTION
    arguments.vllm_words, arguments.words = beyond, given
    try:
        _refuse(left, arguments)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"vllm-saguaro: {error}", file=sys.stderr)
        return BAD_QUESTION
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        print(
            f"vllm-saguaro: {arguments.command} needs {error.name}, which is not installed for this Python: see "
            "vllm-saguaro doctor",
            file=sys.stderr,
        )
        return BAD_QUESTION
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _refuse(left: Sequence[str], arguments: argparse.Namespace) -> None:
    """Raises UsageError where there are words that nobody asked for: argparse would show the usage of all commands."""
    if not left:
        return
    command = " ".join(filter(None, (arguments.command, getattr(arguments, "named_part", None))))
    options = [word.partition("=")[0] for word in left if word.startswith("-")]
    what = f"unknown option {options[0]}" if options else f"one word too many, {left[0]!r}"
    raise UsageError(f"{command}: {what}: see vllm-saguaro {command} --help")
