"""The site has every page once, and builds without a warning where MkDocs is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_commands import extras
from tests.unit.docs.doc_pages import ROOT

INSTALLED = None not in (importlib.util.find_spec("mkdocs"), importlib.util.find_spec("material"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_page_is_in_the_navigation_once() -> None:
    docs = ROOT / "docs"
    assert sorted(pages_of(SITE["nav"])) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_what_is_broken_breaks_the_build() -> None:
    assert SITE["strict"] is True
    levels = {level for part in SITE["validation"].values() for level in part.values()}
    assert levels == {"warn"}


def test_the_packages_have_an_extra() -> None:
    assert "docs" in extras()


def left_out(installed: bool, environment: Mapping[str, str]) -> bool:
    """Whether the site cannot be built here, and nobody has said that it must be."""
    return not installed and not environment.get("CI")


@pytest.mark.parametrize(
    ("installed", "environment", "expected"),
    [(True, {}, False), (False, {}, True), (False, {"CI": "true"}, False), (True, {"CI": "true"}, False)],
)
def test_where_all_is_checked_the_site_is_never_left_out(
    installed: bool, environment: dict[str, str], expected: bool
) -> None:
    assert left_out(installed, environment) is expected


@pytest.mark.skipif(left_out(INSTALLED, os.environ), reason='MkDocs is not installed: pip install ".[docs]"')
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert (tmp_path / "site" / "troubleshooting" / "index.html").is_file()
