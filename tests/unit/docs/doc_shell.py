"""Every command that a block of README and docs shows, as a shell would read it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.unit.docs.doc_commands import ABBREVIATION
from tests.unit.docs.doc_pages import PAGES, Block, blocks, name_of

LANGUAGES = ("bash", "sh", "shell", "console")
_PROGRAM = re.compile(
    r"\$ |(?:\S*/)?python3? |scripts/|examples/\w+\.|vllm(?:-saguaro)? |"
    r"(?:curl|pip|docker|kubectl|ray|mkdocs|git|cd|export) "
)
"""How the first line of a block without a language begins where it is one of commands."""
_PROMPT = "$ "


@dataclass(frozen=True)
class Shown:
    """One command, pipes and all, without remarks. `output`: what a transcript shows below it."""

    page: str
    line: int
    text: str
    output: str = ""

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return f"{self.page}:{self.line}"


def shown() -> list[Shown]:
    """All of them, page by page."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), name_of(page)):
            if is_shell(block):
                found += list(commands_of(block))
    return found


def is_shell(block: Block) -> bool:
    """Whether a block shows commands."""
    return block.language in LANGUAGES or (not block.language and _PROGRAM.match(block.text) is not None)


def commands_of(block: Block) -> Iterator[Shown]:
    """The commands of a block: of a transcript those after a prompt, else all lines."""
    if block.text.startswith(_PROMPT):
        for part in block.text.split(f"\n{_PROMPT}"):
            command, _, output = part.removeprefix(_PROMPT).partition("\n")
            yield Shown(block.page, block.line, command.strip(), output.rstrip())
        return
    for line in logical_lines(block.text.replace(ABBREVIATION, "")):
        yield Shown(block.page, block.line, line)


def logical_lines(text: str) -> Iterator[str]:
    """Lines as a shell takes them: joined where one ends in a backslash or within a quotation; remarks left out."""
    held = ""
    for line in text.splitlines():
        held += line if held else without_remark(line)
        if held.endswith("\\"):
            held = held[:-1]
            continue
        try:
            shlex.split(held)
        except ValueError:
            held += "\n"
            continue
        if held.strip():
            yield " ".join(held.split())
        held = ""
    if held.strip():
        raise AssertionError(f"a quotation is not closed: {held}")


def without_remark(line: str) -> str:
    """A line up to a # that is not within a quotation."""
    for found in re.finditer(r"(?:^|\s)#", line):
        with contextlib.suppress(ValueError):
            shlex.split(line[: found.start()])
            return line[: found.start()]
    return line
