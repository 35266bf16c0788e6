"""`vllm-saguaro simulate`: what speculation would gain on machines that are not here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_saguaro.cli.usage import UsageError
from vllm_saguaro.cli.writing import check_picture

if TYPE_CHECKING:
    from vllm_saguaro.simulation.comparison import Compared
    from vllm_saguaro.simulation.plan import Plan
    from vllm_saguaro.simulation.world import World

WORLDS = ("llama-70b", "qwen-32b")
ENGINES = ("plain", "sd", "ssd", "ours")
SWEEPS = ("cost-ratio", "hit-rate", "batch", "k", "branches", "drafts", "latency", "requests")
EXAMPLES = """examples:
  vllm-saguaro simulate                                        Llama 70B / 1B on H100s: AR, SD, SSD, ours
  vllm-saguaro simulate --world qwen-32b --batch 8 --drafts 2  eight requests, two drafts
  vllm-saguaro simulate --sweep cost-ratio latency --plot sensitivity.png
  vllm-saguaro simulate --report docs/results/headline_12_6.json --k 4
  vllm-saguaro simulate --world llama-70b --print-world > mine.json; vllm-saguaro simulate --world mine.json
  vllm-saguaro simulate --validate docs/results/headline_12_6.json docs/results/curve.json

AR: plain decoding; SD: ordinary speculation; SSD: the engine of the paper; ours: saguaro.
K: drafts a round; N: predicted outcomes that get drafts.
What the numbers are fed with, and how far they can be trusted: docs/simulate.md.

exit codes: 0 it was simulated; 1 the picture was not written; 2 the question was wrong; 130 stopped"""


def add_to(commands: Any) -> None:
    """The command's own options."""
    command = commands.add_parser(
        "simulate",
        help="what it would gain, on machines that are not here",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = command.add_argument_group("the world")
    given.add_argument("--world", default=WORLDS[0], help=f"{', '.join(WORLDS)}, or a JSON file (default: %(default)s)")
    given.add_argument("--report", type=Path, help="a report of scripts/bench.py instead: its first workload")
    given.add_argument("--hit-rate", type=float, help="the same at every N, instead of the world's")
    given.add_argument("--latency", type=float, metavar="MS", help="one way between target and draft, milliseconds")
    given.add_argument("--jitter", type=float, help="how much passes vary, as a share (0.1: by a tenth)")
    given.add_argument("--print-world", action="store_true", help="print the world as JSON and end")
    plan = command.add_argument_group("the load")
    plan.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES, help="(default: all four)")
    plan.add_argument("--k", type=int, help="drafts a round (default: the best one of each engine)")
    plan.add_argument("--branches", type=int, default=0, help="N (default: as many as pay; of SSD 24)")
    plan.add_argument("--batch", type=int, default=1, help="requests at once (default: %(default)s)")
    plan.add_argument("--requests", type=int, help="requests in all (default: 24 a place of the batch, 2 beyond 32)")
    plan.add_argument("--tokens", type=int, default=256, help="a request (default: %(default)s)")
    plan.add_argument("--drafts", type=int, default=1, help="drafts that share the requests (default: %(default)s)")
    plan.add_argument("--backup", choices=("none", "jit"), default="jit", help="of SSD, after a miss (default: jit)")
    plan.add_argument("--adaptive", action="store_true", help="ours verifies no more drafts than pay")
    plan.add_argument("--seed", type=int, default=0)
    output = command.add_argument_group("the answer")
    output.add_argument("--sweep", nargs="+", choices=(*SWEEPS, "all"), default=(), help="vary one thing at a time")
    output.add_argument("--plot", type=Path, metavar="PNG", help="a picture of the sweeps")
    output.add_argument(
        "--validate",
        nargs="*",
        type=Path,
        metavar="REPORT",
        help="predicted against measured: these reports, the paper",
    )
    output.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print."""
    from vllm_saguaro.simulation.world import WorldError

    try:
        if arguments.validate is not None:
            return _validate(arguments)
        return _simulate(arguments)
    except WorldError as error:
        raise UsageError(f"simulate: {error}") from error


def _validate(arguments: argparse.Namespace) -> int:
    from vllm_saguaro.simulation.validation import as_markdown, own_lines, paper_lines, reproduction_lines

    lines = [*own_lines(arguments.validate), *paper_lines(), *reproduction_lines()]
    if arguments.json:
        print(json.dumps({"lines": [line.to_json() for line in lines]}, indent=1))
    else:
        print(as_markdown(lines))
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from vllm_saguaro.simulation.comparison import compare, sweep

    world = _world(arguments)
    if arguments.print_world:
        print(json.dumps(world.to_json(), indent=1))
        return 0
    plan = _plan(arguments)
    names = SWEEPS if "all" in arguments.sweep else tuple(dict.fromkeys(arguments.sweep))
    if arguments.plot is not None:
        if not names:
            raise UsageError("simulate: --plot shows sweeps: write --sweep too, with what is to be varied")
        check_picture("simulate", "--plot", arguments.plot)
    compared = compare(world, plan, arguments.k, arguments.engine)
    sweeps = {name: list(sweep(world, plan, arguments.k, name, arguments.engine)) for name in names}
    drawn = arguments.plot is None or _draw(sweeps, world.name, arguments.plot)
    if arguments.json:
        answer = {
            "world": world.to_json(),
            "engines": [found.to_json() for found in compared],
            "sweeps": {name: [found.to_json() for found in line] for name, line in sweeps.items()},
        }
        print(json.dumps(answer, indent=1))
        return int(not drawn)
    load = f"batch {plan.batch}" + (f", {plan.drafts} drafts" if plan.drafts > 1 else "")
    print(f"{world.name}, {load}, {plan.requests} requests of {plan.tokens} tokens\n\n{table(compared)}")
    for name, line in sweeps.items():
        print(f"\n{sweep_table(name, line)}")
    if arguments.plot is not None and drawn:
        print(f"\nwritten to {arguments.plot}")
    return int(not drawn)


def _draw(sweeps: Mapping[str, Sequence[Compared]], title: str, path: Path) -> bool:
    """Whether the picture could be written. What was simulated is printed all the same."""
    from vllm_saguaro.simulation.plots import plot_sweeps

    try:
        plot_sweeps(sweeps, title, path)
    except OSError as error:
        print(f"vllm-saguaro: simulate: the picture was not written: {error}", file=sys.stderr)
        return False
    return True


def _world(arguments: argparse.Namespace) -> World:
    from vllm_saguaro.simulation.published import WORLDS as PUBLISHED
    from vllm_saguaro.simulation.reports import read_report, world_of
    from vllm_saguaro.simulation.world import HitCurve, World

    if arguments.report is not None:
        benches = read_report(arguments.report)
        if not benches:
            raise UsageError(
                f"simulate: {arguments.report} has no workload with plain, draft_model and saguaro in its own process"
            )
        world = world_of(benches[0], min(benches[0].ours, key=lambda measured: measured.k))
    elif arguments.world in PUBLISHED:
        world = PUBLISHED[arguments.world]
    elif arguments.world.endswith(".json"):
        world = World.read(Path(arguments.world))
    else:
        raise UsageError(
            f"simulate: the world {arguments.world!r} is not known: write {' or '.join(WORLDS)}, or a file that ends "
            "in .json"
        )
    changes: dict[str, Any] = {}
    if arguments.hit_rate is not None:
        changes["hits"] = HitCurve.constant(arguments.hit_rate)
    if arguments.latency is not None:
        changes["latency"] = arguments.latency / 1e3
    if arguments.jitter is not None:
        changes["jitter"] = arguments.jitter
    return world.replace(**changes)


def _plan(arguments: argparse.Namespace) -> Plan:
    from vllm_saguaro.simulation.plan import Plan

    requests = arguments.requests or arguments.batch * (24 if arguments.batch <= 32 else 2)
    return Plan(
        engine="ours",
        branches=arguments.branches,
        batch=arguments.batch,
        requests=requests,
        tokens=arguments.tokens,
        drafts=arguments.drafts,
        backup=arguments.backup,
        adaptive=arguments.adaptive,
        seed=arguments.seed,
    )


def table(compared: Sequence[Compared]) -> str:
    """The engines, one a line."""
    from vllm_saguaro.simulation.comparison import NAMES

    lines = [
        f"{'':<5} {'K':>3} {'N':>4} {'tokens/s':>9} {'/ AR':>6} {'/ SD':>6} {'tok/round':>9} {'hit':>5} {'late':>5} "
        f"{'step ms':>8} {'waits ms':>8} {'ideal':>6}"
    ]
    for found in compared:
        result = found.result
        lookups = result.engine in ("ssd", "ours")
        waits = 1e3 * result.waited / result.passes
        hit, late = (_percent(share if lookups else None) for share in (result.hit_rate, result.late_share))
        lines.append(
            f"{NAMES[result.engine]:<5} {result.k or '':>3} {result.branches or '':>4} "
            f"{result.tokens_per_second:>9.1f} {found.over_plain:>6.2f} {found.over_sd:>6.2f} "
            f"{result.tokens_per_round:>9.2f} {hit:>5} {late:>5} "
            f"{1e3 * result.step_seconds:>8.2f} {waits:>8.2f} {_percent(found.share_of_ideal):>6}"
        )
    return "\n".join(lines)


def sweep_table(name: str, line: Sequence[Compared]) -> str:
    """Tokens a second over AR, a column an engine, a line a value."""
    from vllm_saguaro.simulation.comparison import NAMES, SWEEPS

    engines = [engine for engine in dict.fromkeys(found.result.engine for found in line) if engine != "plain"]
    wide = max(len(SWEEPS[name].title), 8)
    lines = [f"{SWEEPS[name].title:<{wide}} " + " ".join(f"{NAMES[engine] + ' / AR':>9}" for engine in engines)]
    for value in dict.fromkeys(found.value for found in line):
        own = {found.result.engine: found for found in line if found.value == value}
        lines.append(f"{value:<{wide}g} " + " ".join(f"{own[engine].over_plain:>9.2f}" for engine in engines))
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
