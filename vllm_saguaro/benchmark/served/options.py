"""The command-line options of a benchmark of servers."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_saguaro.benchmark.options import add_dataset
from vllm_saguaro.benchmark.served.settings import Settings, server

AGAINST = "--against-server"
"""The option that says that servers are measured, and no engines are started."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything that `Settings` holds."""
    defaults = Settings(())
    parser.add_argument(
        AGAINST,
        nargs="+",
        required=True,
        type=_server,
        metavar="[NAME=]URL",
        help="servers that run already; the first is the one that others are compared with",
    )
    parser.add_argument("--model", metavar="NAME", help="what requests ask for (default: the one that is served)")
    parser.add_argument(
        "--dataset-path",
        "--prompt-file",
        type=Path,
        default=defaults.dataset_path,
        metavar="JSONL",
        help="the prompts (default: those of the committed pair, in a checkout)",
    )
    add_dataset(parser)
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        default=list(defaults.concurrency),
        metavar="C",
        help="requests under way at any time (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        nargs="+",
        type=float,
        default=list(defaults.temperature),
        metavar="T",
        help="0 is greedy: then texts are compared (default: 0)",
    )
    for option, default, text in (
        ("--prompts", defaults.prompts, "prompts in a repetition"),
        ("--tokens", defaults.tokens, "new tokens for each prompt"),
        ("--repetitions", defaults.repetitions, "turns of every server"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask /v1/chat/completions, each prompt as a user's message: for models that were taught to answer",
    )
    parser.add_argument(
        "--prefix-cache",
        action="store_true",
        help="let servers find prompts that come again in their prefix cache: TTFT is then that of a known prompt",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="SECONDS",
        help="for one text (default: %(default)g)",
    )


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings that the options say."""
    return Settings(
        servers=tuple(arguments.against_server),
        dataset=arguments.dataset,
        dataset_path=arguments.dataset_path,
        category=arguments.category,
        model=arguments.model,
        concurrency=tuple(dict.fromkeys(arguments.concurrency)),
        temperature=tuple(dict.fromkeys(arguments.temperature)),
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        chat=arguments.chat,
        prefix_cache=arguments.prefix_cache,
        timeout=arguments.timeout,
    )


def _server(text: str) -> tuple[str, str]:
    try:
        return server(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
