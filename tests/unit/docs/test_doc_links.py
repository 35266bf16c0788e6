"""No page points to what is not there: neither a file nor a heading, neither in the repository nor in the site."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_pages import PAGES, ROOT, headings, links, name_of, site_slug, slug

SOURCES = sorted(
    path
    for folder in ("vllm_saguaro", "scripts", "examples", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".yaml") and "docs/" in path.read_text(encoding="utf-8")
)
"""Whatever else may point to a page: errors that name one, comments, help."""


def trouble(page: Path, target: str) -> str:
    """What is wrong with a link of a page, if anything. Links to other machines are not followed."""
    if "://" in target or target.startswith("mailto:"):
        return ""
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    if path.startswith("/") or not found.is_relative_to(ROOT):
        return "leaves the repository"
    if not found.exists():
        return "there is no such file"
    if page.is_relative_to(ROOT / "docs") and not found.is_relative_to(ROOT / "docs"):
        return "leaves the site: name the file instead"
    if anchor:
        there = headings(found.read_text(encoding="utf-8")) if found.suffix == ".md" else []
        if anchor not in map(slug, there):
            return "there is no such heading"
        if anchor not in map(site_slug, there):
            return "the site gives that heading another anchor"
    return ""


def other_links(text: str) -> list[str]:
    """Links as `[name]: target` or in HTML."""
    without_code = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^ *\[[^\]]+\]: \S+|<(?:img|a)\s[^>]*>", without_code, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    found = {target: trouble(page, target) for target in links(page.read_text(encoding="utf-8"))}
    assert {target: what for target, what in found.items() if what} == {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_is_of_the_kind_that_is_looked_at(page: Path) -> None:
    """Neither `[name]: target` nor HTML: no test would follow them."""
    assert other_links(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_every_page_that_the_source_names_is_there(source: Path) -> None:
    named = re.findall(r"\bdocs/[\w/]+\.md(?:#[\w-]+)?", source.read_text(encoding="utf-8"))
    assert {name: what for name in named if (what := trouble(ROOT / "README.md", name))} == {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_two_headings_of_a_page_have_one_anchor(page: Path) -> None:
    found = [slug(heading) for heading in headings(page.read_text(encoding="utf-8"))]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("nothing.md", "there is no such file"),
        ("options.md#nothing", "there is no such heading"),
        ("#nothing", "there is no such heading"),
        ("../README.md", "leaves the site: name the file instead"),
        ("../../elsewhere", "leaves the repository"),
        ("/docs/options.md", "leaves the repository"),
        ("options.md#our-keys", ""),
        ("results/batches.png", ""),
        ("https://example.org/nothing", ""),
    ],
)
def test_a_dead_link_would_be_noticed(target: str, what: str) -> None:
    assert trouble(ROOT / "docs" / "index.md", target) == what


def test_links_of_another_kind_would_be_noticed() -> None:
    text = '[a]: b.md\n<img src="c.png">\n```bash\n[d]: e\n```\n[f](g.md)\n'
    assert other_links(text) == ["[a]: b.md", '<img src="c.png">']


def test_links_are_found_outside_code_alone() -> None:
    text = "[a](b.md) `[c](d.md)` ![e `f`](g.png)\n```bash\n[h](i.md)\n```\n[[1]](j.md)\n"
    assert links(text) == ["b.md", "g.png", "j.md"]


def test_anchors_are_those_of_repository_and_site() -> None:
    assert slug("vLLM's keys, 0.32 (a draft)") == site_slug("vLLM's keys, 0.32 (a draft)") == "vllms-keys-032-a-draft"
    assert slug("a - b") != site_slug("a - b")
