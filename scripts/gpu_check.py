"""Everything that a GPU has to show of Saguaro, in one run that takes less than nine minutes and fetches nothing.

    python scripts/gpu_check.py                              the shapes of 8B and 1B, then of 32B and 0.6B
    python scripts/gpu_check.py --pair 32b/0.6b --also       those of 32B and 0.6B alone
    python scripts/gpu_check.py --cpu                        the check itself, small, under Triton's interpreter

On one H100 or H200; with a second GPU, Saguaro with a draft process on that one, too. The models have the committed
pair's function and the size that is named (`gpu_checking/widened.py`). Sections, each of which goes on when another
fails: the Triton kernels are their twins, and how long each takes; plain vLLM, Saguaro on a stream, and vLLM's
draft_model, each at every batch and temperature; greedy texts and samples are plain vLLM's; drafts are accepted,
outcomes hit; the plugin never waits for the device; what a hit costs; CUDA graphs are captured; the draft owns up to
its memory; a profiler's trace shows how much of its work is hidden; the goals of speed. The exit status is 1 if any of
it failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.gpu_checking.session import Session
from scripts.gpu_checking.settings import MODES, PROCESS, Settings, SettingsError, on_cpu
from scripts.gpu_checking.shapes import PAIRS
from scripts.gpu_checking.tables import failures, goal_table, speed_table
from scripts.repository import ROOT
from vllm_saguaro.benchmark.records import write_json


def parser() -> argparse.ArgumentParser:
    """The command line; what is left out is as in `Settings`, or as in `on_cpu` with --cpu."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--cpu", action="store_true", help="small, on the CPU, what can run there")
    add("--pair", choices=PAIRS, help="shapes of target and draft (default: 8b/1b)")
    add("--also", nargs="*", choices=PAIRS, help="pairs whose speed is measured after it, in the time that is left")
    add("--engines", nargs="+", choices=MODES, dest="modes", help=f"(default: all; {PROCESS} with two GPUs)")
    add("--batch", nargs="+", type=int, dest="batches", metavar="B", help="(default: 1 4 16 64)")
    add("--temperature", nargs="+", type=float, dest="temperatures", metavar="T", help="(default: 0 1)")
    add("--k", type=int, help="num_speculative_tokens (default: 4)")
    add("--tokens", type=int, help="new tokens a request (default: 128)")
    add("--texts", type=int, help="greedy texts that are compared (default: 32)")
    add("--samples", type=int, help="samples that are compared (default: 1024)")
    add("--dtype", help="(default: bfloat16)")
    add("--budget", type=float, metavar="SECONDS", help="of the whole run; what does not fit fails (default: 520)")
    add("--engine-option", action="append", default=[], metavar="KEY=JSON", help="of LLM, for every engine")
    add("--option", action="append", default=[], metavar="KEY=JSON", help="of Saguaro's speculative config")
    add("--output", type=Path, metavar="FOLDER", help="report, logs and trace (default: results/gpu-<time>)")
    return found


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings that a command line means."""
    given = vars(arguments)
    gpus = 0 if arguments.cpu else torch.cuda.device_count()
    modes = MODES if gpus > 1 else tuple(mode for mode in MODES if mode != PROCESS)
    values: dict[str, Any] = on_cpu() if arguments.cpu else {"gpus": gpus, "modes": modes}
    names = ("pair", "also", "modes", "batches", "temperatures", "k", "tokens", "texts", "samples", "dtype", "budget")
    for name in names:
        if given[name] is not None:
            values[name] = tuple(given[name]) if isinstance(given[name], list) else given[name]
    if arguments.also is None:
        also: tuple[str, ...] = values.get("also", Settings.also)
        values["also"] = tuple(pair for pair in also if pair != values.get("pair", Settings.pair))
    values["engine"] = dict(map(pair_of, arguments.engine_option))
    values["speculation"] = dict(map(pair_of, arguments.option))
    return Settings(**values)


def pair_of(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where the value is JSON or else a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise SettingsError(f"{text!r} is no option: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def main(words: list[str] | None = None) -> int:
    """Run from the command line; the exit status."""
    arguments = parser().parse_args(words)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (arguments.output or ROOT / "results" / f"gpu-{stamp}").resolve()
    begin = time.monotonic()
    try:
        report = Session(settings_from(arguments), folder, say).run()
    except SettingsError as error:
        raise SystemExit(f"gpu_check.py: {error}") from error
    write_json(folder / "report.json", report)
    say("\n" + speed_table(report) + "\n\n" + goal_table(report) + "\n")
    if not report["passed"]:
        say(failures(report) + "\n")
    shown = sum(not section["complaints"] for section in report["sections"])
    seconds = time.monotonic() - begin
    say(f"{shown} of {len(report['sections'])} sections passed in {seconds:.0f} s; see {folder.name}/report.json")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
