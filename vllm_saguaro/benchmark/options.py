"""The command-line options that `bench` and `demo.py` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark.prompts import DATASETS
from vllm_saguaro.benchmark.records import MODES
from vllm_saguaro.benchmark.settings import Settings, relative
from vllm_saguaro.config import AUTO, DRAFT_SAMPLE_METHODS, FAN_OUTS

DEPTHS = [(40, 2), (20, 2), (12, 2), (12, 4), (12, 6), (12, 9)]


def add_options(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Everything that `Settings` holds."""
    pair = parser.add_argument_group("the pair")
    pair.add_argument(
        "--target",
        type=Path,
        default=defaults.target,
        metavar="FOLDER",
        help=f"target model (default: {relative(defaults.target)})",
    )
    pair.add_argument(
        "--draft", type=Path, metavar="FOLDER", help="draft model (default: draft/ in the target's folder)"
    )
    pair.add_argument(
        "--prompt-file",
        "--dataset-path",
        type=Path,
        metavar="JSONL",
        help='lines of {"prompt": ...} (default: prompts.jsonl beside the target)',
    )
    add_dataset(pair)
    pair.add_argument(
        "--target-layers",
        type=int,
        default=defaults.target_layers,
        metavar="L",
        help=_help("deepen the target to L layers with layers that compute nothing", defaults.target_layers),
    )
    pair.add_argument(
        "--draft-layers",
        type=int,
        default=defaults.draft_layers,
        metavar="L",
        help=_help("deepen the draft likewise", defaults.draft_layers),
    )
    pair.add_argument("--dtype", default=defaults.dtype, help=_help("of the weights", defaults.dtype))

    engines = parser.add_argument_group("engines (every combination is loaded once, then they take turns)")
    engines.add_argument("--modes", nargs="+", choices=MODES, default=list(defaults.modes), help="(default: all three)")
    engines.add_argument(
        "--k",
        nargs="+",
        type=int,
        default=list(defaults.k),
        metavar="K",
        help=_help("draft tokens per round, of draft_model and of saguaro", defaults.k),
    )
    engines.add_argument(
        "--branches",
        nargs="+",
        type=branches,
        default=list(defaults.branches),
        metavar="N",
        help=_help('saguaro\'s branches, a number or "auto"', defaults.branches),
    )
    engines.add_argument(
        "--sampling",
        nargs="+",
        choices=DRAFT_SAMPLE_METHODS,
        default=list(defaults.sampling),
        help=_help("saguaro's draft_sample_method", defaults.sampling),
    )
    engines.add_argument(
        "--baseline-sampling",
        nargs="+",
        choices=("greedy", "probabilistic"),
        default=list(defaults.baseline_sampling),
        help=_help("draft_model's draft_sample_method", defaults.baseline_sampling),
    )
    engines.add_argument(
        "--fan-out",
        nargs="+",
        choices=FAN_OUTS,
        default=list(defaults.fan_out),
        help=_help("saguaro's fan-out", defaults.fan_out),
    )
    engines.add_argument(
        "--option",
        action="append",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="another key of saguaro's speculative config, such as placement=inline; repeatable",
    )
    engines.add_argument(
        "--sweep",
        action="append",
        type=key_values,
        default=[],
        metavar="KEY=V1,V2,...",
        help="saguaro engines for every value of such a key, as in sampling_c=0.5,1,auto; repeatable",
    )
    engines.add_argument(
        "--forecasts",
        action="store_true",
        help="count what saguaro's draft side believed of the outcomes; needs --option placement=inline",
    )
    engines.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        default=defaults.eager,
        help=_help("without torch.compile: starts faster, runs slower", defaults.eager),
    )
    engines.add_argument(
        "--core-target",
        type=cores,
        default=(),
        metavar="CORES",
        help="cores of the target, and of draft_model's draft (default: the first allowed one)",
    )
    engines.add_argument(
        "--core-draft",
        type=cores,
        default=(),
        metavar="CORES",
        help="cores of saguaro's draft (default: the next allowed one)",
    )

    work = parser.add_argument_group("workload")
    work.add_argument(
        "--batch",
        nargs="+",
        type=int,
        default=list(defaults.batch),
        metavar="B",
        help=_help("requests at once", defaults.batch),
    )
    work.add_argument(
        "--temperature",
        nargs="+",
        type=float,
        default=list(defaults.temperature),
        metavar="T",
        help=_help("0 is greedy", defaults.temperature),
    )
    work.add_argument(
        "--top-p",
        nargs="+",
        type=float,
        default=list(defaults.top_p),
        metavar="P",
        help=_help("at every temperature; 1 cuts nothing", defaults.top_p),
    )
    work.add_argument(
        "--prompts",
        type=int,
        default=defaults.prompts,
        metavar="N",
        help=_help("prompts in a repetition", defaults.prompts),
    )
    work.add_argument(
        "--tokens",
        type=int,
        default=defaults.tokens,
        metavar="N",
        help=_help("new tokens for each prompt", defaults.tokens),
    )
    work.add_argument(
        "--repetitions",
        type=int,
        default=defaults.repetitions,
        metavar="R",
        help=_help("turns of every engine", defaults.repetitions),
    )


def add_dataset(group: Any) -> None:
    """What is in the file of prompts, and which of it."""
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default=DATASETS[0],
        help="what is in that file: our prompts, or Spec-Bench's question.jsonl (default: %(default)s)",
    )
    group.add_argument("--category", metavar="NAME", help="only questions of this category of spec_bench")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings that the options say."""
    return Settings(
        target=arguments.target,
        draft=arguments.draft,
        prompt_file=arguments.prompt_file,
        dataset=arguments.dataset,
        category=arguments.category,
        modes=tuple(arguments.modes),
        batch=_unique(arguments.batch),
        temperature=_unique(arguments.temperature),
        top_p=_unique(arguments.top_p),
        k=_unique(arguments.k),
        branches=_unique(arguments.branches),
        fan_out=_unique(arguments.fan_out),
        sampling=_unique(arguments.sampling),
        baseline_sampling=_unique(arguments.baseline_sampling),
        options=dict(arguments.option),
        sweep=tuple(arguments.sweep),
        forecasts=arguments.forecasts,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        target_layers=arguments.target_layers,
        draft_layers=arguments.draft_layers,
        dtype=arguments.dtype,
        eager=arguments.eager,
        core_target=arguments.core_target,
        core_draft=arguments.core_draft,
    )


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _help(text: str, default: object) -> str:
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text} (default: {'no' if default is None or default is False else default})"


def branches(text: str) -> int | str:
    """A number of branches, or "auto"."""
    return text if text == AUTO else int(text)


def cores(text: str) -> tuple[int, ...]:
    """`0`, `0,2` or `0-3`."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a core: write 0 or 0,2 or 0-3") from None
    return tuple(sorted(found))


def key_value(text: str) -> tuple[str, Any]:
    """`key=value`, the value as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def key_values(text: str) -> tuple[str, tuple[Any, ...]]:
    """`key=value,value,...`, each value as `key_value` reads it."""
    key, _ = key_value(text)
    values = [key_value(f"{key}={value}")[1] for value in text.partition("=")[2].split(",")]
    if any(value == "" or isinstance(value, list | dict) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=V1,V2,... with numbers and words")
    return key, _unique(values)


def add_depths(parser: argparse.ArgumentParser) -> None:
    """The points of a curve."""
    parser.add_argument(
        "--depths",
        nargs="+",
        type=depths,
        default=DEPTHS,
        metavar="T:D",
        help=f"layers of target and draft (default: {' '.join(f'{t}:{d}' for t, d in DEPTHS)})",
    )


def depths(text: str) -> tuple[int, int]:
    """`24:6`: layers of target and draft."""
    try:
        target, draft = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write layers of target and draft as 24:6") from None
    return target, draft
