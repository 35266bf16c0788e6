"""Every command of README and docs is run by a test, or the table says why it is not.

What takes seconds runs here; what imports vLLM is marked slow; what starts an engine is in
tests/e2e/test_documented_commands.py, marked long.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_pages import ROOT, Block
from tests.unit.docs.doc_shell import Shown, commands_of, is_shell, logical_lines, shown
from tests.unit.docs.doc_shells import run
from tests.unit.docs.doc_ways import WAYS, Cannot, Cost, Runs, line_of, once, way_of

COMMANDS = shown()
ONCE = once(COMMANDS)


def of_cost(cost: Cost) -> list[Shown]:
    return [each for each in ONCE if isinstance(way := way_of(each.text), Runs) and way.cost is cost]


def is_named(command: Shown) -> str:
    return command.text[:60]


def run_as_shown(command: Shown, folder: Path) -> str:
    way = way_of(command.text)
    assert isinstance(way, Runs)
    return run(command, way, folder)


@pytest.mark.parametrize("command", ONCE, ids=is_named)
def test_every_command_has_a_way(command: Shown) -> None:
    assert way_of(command.text), (
        f"{command.place} shows a command that no test runs: {command.text}\n"
        "write into doc_ways.py how it is run, or why it cannot be"
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.pattern)
def test_every_way_is_that_of_a_command(way: object) -> None:
    assert [command for command in ONCE if way_of(command.text) is way]


@pytest.mark.parametrize("way", [way for way in WAYS if isinstance(way, Cannot)], ids=lambda way: way.pattern)
def test_what_cannot_run_says_why_and_its_other_test_exists(way: Cannot) -> None:
    assert len(way.because) > 5
    if way.instead:
        file, _, name = way.instead.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), way.instead


@pytest.mark.parametrize("command", of_cost(Cost.QUICK), ids=is_named)
def test_a_quick_command_does_what_the_page_says(command: Shown, tmp_path: Path) -> None:
    run_as_shown(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", of_cost(Cost.SLOW), ids=is_named)
def test_a_command_does_what_the_page_says(command: Shown, tmp_path: Path) -> None:
    run_as_shown(command, tmp_path)


@pytest.mark.parametrize(
    "text", ["vllm-saguaro frobnicate", "python scripts/nothing.py", "ray stop", "pip install vllm-saguaro", "ls"]
)
def test_a_new_command_would_be_noticed(text: str) -> None:
    assert way_of(text) is None


def test_a_command_that_fails_would_be_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with 2"):
        run(Shown("x", 1, "vllm-saguaro simulate --world nothing"), Runs("", Cost.QUICK), tmp_path)
    with pytest.raises(AssertionError, match="says nothing like"):
        run(Shown("x", 1, "vllm-saguaro --version"), Runs("", Cost.QUICK, says="9.9.9"), tmp_path)
    with pytest.raises(AssertionError, match="shows another output"):
        run(Shown("x", 1, "vllm-saguaro --version", "9.9.9"), Runs("", Cost.QUICK, repeats=True), tmp_path)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/command.md", "docs/results.md"} <= {each.page for each in COMMANDS}
    assert len(of_cost(Cost.QUICK)) >= 5
    assert len(of_cost(Cost.LONG)) >= 15


def test_a_transcript_is_a_command_and_its_output() -> None:
    block = Block("x.md", 3, "", "$ vllm-saguaro simulate\nline\n\nlast\n$ vllm-saguaro doctor\n12 ok\n")
    assert is_shell(block)
    assert list(commands_of(block)) == [
        Shown("x.md", 3, "vllm-saguaro simulate", "line\n\nlast"),
        Shown("x.md", 3, "vllm-saguaro doctor", "12 ok"),
    ]


def test_lines_are_those_of_a_shell() -> None:
    text = "# a remark\na b   # another\n\nc \\\n  d\ne '{\"x\": 1,\n  \"y\": 2}'\nf | g 'h # i'\n"
    assert list(logical_lines(text)) == ["a b", "c d", 'e \'{"x": 1, "y": 2}\'', "f | g 'h # i'"]


def test_what_a_page_leaves_open_is_filled_in() -> None:
    command = Shown("x", 1, 'vllm serve MODEL --x \'{"model": "DRAFT"}\' --sweep k=1,2,3')
    line = line_of(command, Runs("", Cost.LONG, less="--to {folder}"), folder="/there")
    assert line == (
        'vllm serve assets/pair/target --x \'{"model": "assets/pair/target/draft"}\' --sweep k=1 --to /there'
    )
