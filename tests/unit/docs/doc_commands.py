"""Whether a command that a page shows would be understood, without running it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.unit.docs.doc_pages import ROOT
from vllm_saguaro.config import METHOD, split_options

sys.path.insert(0, str(ROOT))

SEPARATORS = ("|", "&&", "||", ";", "&")
REDIRECTIONS = (">", ">>", "<", "2>")
ABBREVIATION = "(the rest as above)"
UNCHECKED = ("cd", "export", "grep", "git", "mkdocs")
"""Commands that are not ours, and whose options are nobody's surprise."""

ServeParser = Callable[[], argparse.ArgumentParser]


class WrongCommand(AssertionError):
    """What is wrong with a command of a page."""


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell text without control flow. Raises WrongCommand where a quotation is open."""
    found: list[list[str]] = []
    held = ""
    for line in text.replace(ABBREVIATION, "").splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1]
            continue
        try:
            words = shlex.split(held, comments=True)
        except ValueError:
            held += "\n"
            continue
        held = ""
        found.append([])
        redirected = False
        for word in words:
            if redirected or word in REDIRECTIONS:
                redirected = word in REDIRECTIONS
            elif word in SEPARATORS:
                found.append([])
            else:
                found[-1].append(word.removesuffix(";"))
            if word.endswith(";"):
                found.append([])
    if held.strip():
        raise WrongCommand(f"a quotation is not closed: {held}")
    return [words for words in found if words]


def check_command(words: Sequence[str], serve_parser: ServeParser) -> None:
    """Raise WrongCommand unless what the command names is there, and takes what it is given."""
    words = [word for place, word in enumerate(words) if not _assigns(words[: place + 1])]
    if not words or words[0] in UNCHECKED:
        return
    program, *rest = words[3:] if words[:2] == ["taskset", "-c"] else words
    if program.rpartition("/")[2] == "python":
        _check_python(rest)
    elif program == "scripts/demo.sh":
        _check_script("scripts/demo.py", rest)
    elif program in ("scripts/test.sh", "scripts/install.sh", ".ci/run") or re.match(r"examples/\w+\.sh$", program):
        if not os.access(ROOT / program, os.X_OK):
            raise WrongCommand(f"{program} cannot be run")
        _check_pytest(rest[1:] if rest[:1] == ["--fast"] else rest)
    elif program == "vllm":
        _check_vllm(rest, serve_parser)
    elif program == "vllm-saguaro":
        main = importlib.import_module("vllm_saguaro.cli.main")
        _parse(main.parser(), main.completed(rest[: rest.index("--")] if "--" in rest else rest))
    elif program == "pip":
        _check_pip(rest)
    elif program == "curl":
        _check_curl(rest)
    elif program in ("docker", "kubectl", "ray"):
        _check_paths(rest)
    else:
        raise WrongCommand(f"nobody knows how to check {program}: teach doc_commands.py")


def check_speculation(value: Any) -> None:
    """Raise WrongCommand unless it is a speculative config of ours that our parser takes, or somebody else's."""
    options = {"method": value} if isinstance(value, str) else value
    if isinstance(options, dict) and options.get("method") == METHOD:
        try:
            split_options(options)
        except ValueError as error:
            raise WrongCommand(str(error)) from error


def check_python(text: str) -> None:
    """Raise WrongCommand or SyntaxError unless it compiles, and every literal speculative config in it is accepted."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "speculative_config":
            with contextlib.suppress(ValueError):  # no literal
                check_speculation(ast.literal_eval(node.value))


def extras() -> set[str]:
    """The names of the optional dependencies in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return set(ast.literal_eval(node.value))
    raise AssertionError("setup.py names no extras")


def serve_parser() -> argparse.ArgumentParser:
    """vLLM's own parser of `vllm serve`, with the plugin's door."""
    import vllm_saguaro

    vllm_saguaro.register()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser())
    return found


def _assigns(words: Sequence[str]) -> bool:
    """Whether the last of these words sets a variable for the command: only assignments stand before it."""
    return all(re.match(r"[A-Z_]+=", word) for word in words)


def _check_python(rest: Sequence[str]) -> None:
    if rest[0] == "-m":
        if importlib.util.find_spec(rest[1]) is None:
            raise WrongCommand(f"there is no module {rest[1]}")
        if rest[1] == "pytest":
            _check_pytest(rest[2:])
    else:
        _check_script(rest[0], rest[1:])


def _check_script(script: str, rest: Sequence[str]) -> None:
    if not (ROOT / script).is_file():
        raise WrongCommand(f"there is no {script}")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not hasattr(module, "parser"):
        raise WrongCommand(f"{script} has no parser() to ask")
    given = module.with_command(list(rest)) if hasattr(module, "with_command") else list(rest)
    arguments = _parse(module.parser(), given)
    if script in ("scripts/bench.py", "scripts/demo.py") and hasattr(arguments, "modes"):
        from vllm_saguaro.benchmark.options import settings_from

        settings_from(arguments)
    for word in given:
        if word.startswith("docs/") and word.endswith(".json") and not (ROOT / word).is_file():
            raise WrongCommand(f"there is no {word}")


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(list(words))
    except SystemExit as error:
        raise WrongCommand(f"{shlex.join(words)}: {said.getvalue().strip().splitlines()[-1:]}") from error


def _check_pytest(rest: Sequence[str]) -> None:
    for before, word in zip(["", *rest], rest, strict=False):
        if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
            raise WrongCommand(f"there is no {word}")
        if before == "-m":
            known = re.findall(r'^ {4}"(\w+): ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
            unknown = set(re.findall(r"\w+", word)) - {*known, "not", "and", "or"}
            if unknown:
                raise WrongCommand(f"there is no marker {unknown}")


def _check_vllm(rest: Sequence[str], serve_parser: ServeParser) -> None:
    if rest[:1] != ["serve"]:
        raise WrongCommand(f"vllm {' '.join(rest)}: only vllm serve is checked")
    check_speculation(_parse(serve_parser(), rest[1:]).speculative_config)


def _check_pip(rest: Sequence[str]) -> None:
    for word in rest[1:]:
        for names in re.findall(r"^(?:vllm-saguaro|\.)\[(.*)\]$", word):
            if not set(names.split(",")) <= extras():
                raise WrongCommand(f"{word}: setup.py has only {sorted(extras())}")


def _check_curl(rest: Sequence[str]) -> None:
    if not any(re.match(r"http://(localhost|127\.0\.0\.1):\d+/", word) for word in rest):
        raise WrongCommand("curl without an address on this machine")
    for before, word in zip(["", *rest], rest, strict=False):
        if before in ("-d", "--data"):
            json.loads(word)


def _check_paths(rest: Sequence[str]) -> None:
    for before, word in zip(["", *rest], rest, strict=False):
        if before in ("-f", "-k", "--file") and not (ROOT / word).exists():
            raise WrongCommand(f"there is no {word}")
