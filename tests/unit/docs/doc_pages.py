"""What is in the project's Markdown: blocks of code, code in a line, links, headings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n)+")
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code; `language` is empty where the page names none."""

    page: str
    line: int
    language: str
    text: str


def name_of(path: Path) -> str:
    """A path as people write it in this repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, page: str) -> Iterator[Block]:
    """The fenced blocks, then the indented ones."""
    for match in _FENCE.finditer(text):
        lines = [line.removeprefix(match[1]) for line in match[3].splitlines()]
        yield Block(page, _line(text, match.start()), match[2], "\n".join(lines) + "\n")
    blanked = _FENCE.sub(lambda match: re.sub(r"[^\n]", "", match[0]), text)
    for match in _INDENTED.finditer(blanked):
        lines = [line[4:] for line in match[0].splitlines()]
        yield Block(page, _line(blanked, match.start()), "", "\n".join(lines) + "\n")


def spans(text: str) -> list[str]:
    """Code within a line."""
    return _SPAN.findall(_FENCE.sub("", text))


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    return _LINK.findall(_SPAN.sub("``", _FENCE.sub("", text)))


def headings(text: str) -> list[str]:
    """The texts of all headings, without markup."""
    found = re.findall(r"^#{1,6} +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("\\", "") for heading in found]


def slug(heading: str) -> str:
    """The anchor that a heading gets from a repository's own page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """The anchor that it gets in the site (Python-Markdown's toc extension)."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
