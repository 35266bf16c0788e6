"""Every command, snippet and configuration that README and docs show is one that is understood."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs import doc_commands
from tests.unit.docs.doc_commands import WrongCommand, check_command, check_python, check_speculation, commands
from tests.unit.docs.doc_pages import PAGES, ROOT, Block, blocks, name_of, spans

BLOCKS = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), name_of(page))]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell")]
SHELL += [block for block in BLOCKS if not block.language and re.match(r"python |scripts/|vllm", block.text)]
SHOWN = re.compile(
    r"(?:\.venv/bin/)?python (?:scripts|examples|-m)|vllm serve |vllm-saguaro \w|pip install |scripts/\S+ -"
)
"""How a command within a line begins."""
SPANS = sorted({(name_of(page), span) for page in PAGES for span in spans(page.read_text(encoding="utf-8"))})
FILE = re.compile(r"(?:scripts|examples|docs|tests|assets|vllm_saguaro)/[\w./-]*\w/?")


def place(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def serve_parser() -> argparse.ArgumentParser:
    return doc_commands.serve_parser()


def check_line(text: str, serve_parser: argparse.ArgumentParser) -> None:
    for words in commands(text):
        check_command(words, lambda: serve_parser)


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_every_command_is_understood(block: Block, serve_parser: argparse.ArgumentParser) -> None:
    check_line(block.text, serve_parser)


@pytest.mark.parametrize(("page", "span"), [each for each in SPANS if SHOWN.match(each[1])])
def test_every_command_within_a_line_is_understood(page: str, span: str, serve_parser: argparse.ArgumentParser) -> None:
    check_line(span, serve_parser)


@pytest.mark.parametrize("block", [block for block in SHELL if doc_commands.ABBREVIATION not in block.text], ids=place)
def test_every_shell_block_is_one_for_bash(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=place)
def test_every_python_snippet_compiles_and_its_speculation_is_accepted(block: Block) -> None:
    check_python(block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("json", "yaml")], ids=place)
def test_every_configuration_can_be_read(block: Block) -> None:
    read = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
    if isinstance(read, dict):
        check_speculation(read.get("speculative-config", read.get("speculative_config", read)))


@pytest.mark.parametrize(("page", "span"), [each for each in SPANS if FILE.fullmatch(each[1])])
def test_every_file_that_is_named_is_there(page: str, span: str) -> None:
    assert (ROOT / span).exists(), f"{page} names {span}"


def test_there_is_something_to_check() -> None:
    pages = {block.page for block in SHELL}
    assert {"README.md", "docs/quickstart.md", "docs/results.md", "docs/benchmark.md", "docs/examples.md"} <= pages
    assert any(block.language == "python" for block in BLOCKS)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("python scripts/bench.py --kk 3", "unrecognized arguments: --kk"),
        ("python scripts/bench.py curve --depths 12-6", "write layers of target and draft"),
        (
            "python scripts/bench.py compare docs/results/curve.json docs/results/nothing.json",
            "there is no docs/results/",
        ),
        ("python scripts/nothing.py", "there is no scripts/nothing.py"),
        ("python -m pytest tests/nothing.py", "there is no tests/nothing.py"),
        ("python -m pytest -m lang", "there is no marker {'lang'}"),
        ("scripts/demo.sh --server", "unrecognized arguments: --server"),
        ("scripts/nothing.sh", "nobody knows how to check scripts/nothing.sh"),
        ("examples/nothing.sh", "examples/nothing.sh cannot be run"),
        ('pip install "vllm-saguaro[rai]"', "setup.py has only"),
        ("docker build -f nothing/Dockerfile .", "there is no nothing/Dockerfile"),
        ("A=1 B=2 frobnicate", "nobody knows how to check frobnicate"),
        ("true | frobnicate", "nobody knows how to check true"),
        ("curl http://example.org", "curl without an address on this machine"),
        ('vllm serve M --speculative-config \'{"method": "saguaro", "branchs": 6}\'', 'unknown key "branchs"'),
        ("vllm serve M --spec-methods saguaro", "unrecognized arguments"),
        ("vllm bench", "only vllm serve is checked"),
        ("vllm serve 'M", "a quotation is not closed"),
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, complaint: str, serve_parser: argparse.ArgumentParser) -> None:
    with pytest.raises(WrongCommand) as caught:
        check_line(line, serve_parser)
    assert complaint in str(caught.value)


def test_a_wrong_snippet_would_be_noticed() -> None:
    with pytest.raises(SyntaxError):
        check_python("LLM(")
    with pytest.raises(WrongCommand, match="num_speculative_tokens is out of range: 99"):
        check_python('LLM(model="m", speculative_config={"method": "saguaro", "num_speculative_tokens": 99})')


def test_commands_go_on_over_lines_and_quotations() -> None:
    text = "a b \\\n  c   # that's a remark\nd 'e\n  f' | g\n\n"
    assert commands(text) == [["a", "b", "c"], ["d", "e\n  f"], ["g"]]
    assert commands("a b > c d; e <f && g 2> h; i &") == [["a", "b", "d"], ["e", "<f"], ["g"], ["i"]]
