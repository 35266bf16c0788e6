"""Held-out prompts through plain vLLM, vLLM's own draft_model and saguaro: one table, one JSON, one plot.

    scripts/demo.sh            installs what is missing, then measures: a few minutes on two cores
    scripts/demo.sh --serve    starts the OpenAI server with saguaro instead

The pair is deepened with layers that compute nothing, so that drafting and verifying cost what they cost for the pairs
that people use, while the texts stay those of the small trained pair. The machinery is that of scripts/bench.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.repository import ROOT
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.options import add_options, settings_from
from vllm_saguaro.benchmark.progress import ProgressBar, say
from vllm_saguaro.benchmark.session import measure
from vllm_saguaro.benchmark.settings import Settings, SettingsError
from vllm_saguaro.benchmark.summary import summarise
from vllm_saguaro.benchmark.tables import demo_table

DEFAULTS = Settings(
    k=(4,),
    branches=("auto",),
    prompts=12,
    tokens=64,
    repetitions=3,
    target_layers=12,
    draft_layers=4,
    eager=True,
)
OUTPUT = ROOT / "results" / "demo.json"
SERVED_NAME = "saguaro-demo"
SERVED_CACHE_BYTES = 1 << 30


def show(settings: Settings, output: Path) -> None:
    """Measure, print the table, write JSON and plot."""
    from vllm_saguaro.benchmark.plots import plot_speeds

    say(
        f"{settings.prompts} held-out prompts x {settings.tokens} tokens, {settings.repetitions} times, through each "
        "engine in turn; loading comes first"
    )
    report = measure(settings, ProgressBar(), lambda text: say(f"warning: {text}"))
    summaries = summarise(report.runs)
    report.write(output)
    plot = plot_speeds(report, summaries, output.with_suffix(".png"))
    print()
    for workload in settings.workloads():
        if len(settings.workloads()) > 1:
            print(f"== {workload.name}")
        print(demo_table([run for run in report.runs if run.workload == workload], summaries), end="\n\n")
    print(f"JSON  {output}\nplot  {plot}")


def server_command(settings: Settings, port: int) -> list[str]:
    """`vllm serve` as a user would write it; the few flags more keep it small on a CPU."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(settings.target),
        "--speculative-config",
        "saguaro",
        "--served-model-name",
        SERVED_NAME,
        "--dtype",
        settings.dtype,
        "--kv-cache-memory-bytes",
        str(SERVED_CACHE_BYTES),
        "--max-num-seqs",
        "8",
        "--port",
        str(port),
        *(["--enforce-eager"] if settings.eager else []),
    ]


def curl_line(port: int) -> str:
    """A request that can be pasted into a shell."""
    request = {"model": SERVED_NAME, "prompt": "def read_lines(path):\n", "max_tokens": 64, "temperature": 0}
    url = f"http://localhost:{port}/v1/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(request))}"


def serve(settings: Settings, port: int) -> None:
    """Become the server: its signals, its exit status, its output."""
    command = server_command(settings, port)
    print("$ " + shlex.join(command).replace(f"{ROOT}/", ""))
    print("\nWhen it says 'Application startup complete', ask it from another terminal:\n")
    print(curl_line(port))
    print(f"\nIts metrics: curl -s http://localhost:{port}/metrics | grep -e saguaro -e spec_decode\n", flush=True)
    os.execve(command[0], command, os.environ | {"VLLM_NO_USAGE_STATS": "1"})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--serve", action="store_true", help="start the server, do not measure")
    found.add_argument("--port", type=int, default=8000, help="of the server (default: 8000)")
    found.add_argument(
        "--output", type=Path, default=OUTPUT, help="JSON; the plot goes beside it (default: results/demo.json)"
    )
    add_options(found, DEFAULTS)
    return found


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = parser().parse_args(words)
    settings = settings_from(arguments)
    try:
        if arguments.serve:
            serve(settings, arguments.port)
        else:
            show(settings, arguments.output)
    except (SettingsError, WorkerError, OSError) as error:
        raise SystemExit(f"demo.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("demo.py: stopped") from None


if __name__ == "__main__":
    main()
