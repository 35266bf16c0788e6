"""docs/design.md names the rooms, their files, and what they may import, as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_pages import ROOT
from tests.unit.test_layout import MAY_IMPORT, PACKAGE, SOURCES, room_of

DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
GPU = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def codes(cell: str) -> set[str]:
    return {code.rstrip("/").removesuffix(".py") for code in re.findall(r"`([^`]+)`", cell)}


def rooms() -> list[tuple[set[str], set[str] | None]]:
    """Rooms that share a row, and what that says they may import; None: everything."""
    section = DESIGN.partition("\n## Rooms\n")[2].partition("\nImports run one way")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(codes(first), None if last.startswith("everything") else codes(last)) for first, *_, last in cells]


BOUND = [(sharing, said) for sharing, said in rooms() if said is not None]
FREE = set[str]().union(*(sharing for sharing, said in rooms() if said is None))
ASIDE = FREE - {"vllm_hooks"} | {"simulation"}
"""Rooms that no round goes through: their files are found by their names, and they have pages of their own."""
ON_THE_PATH = [path for path in SOURCES if room_of(path) not in ASIDE and path.stem != "__init__"]


@pytest.mark.parametrize(("sharing", "said"), BOUND, ids=lambda names: " ".join(sorted(names)))
def test_what_a_room_may_import_is_what_the_page_says(sharing: set[str], said: set[str]) -> None:
    assert set().union(*(MAY_IMPORT[room] for room in sharing)) - sharing == said


def test_every_room_has_a_row() -> None:
    assert set().union(*(sharing for sharing, _ in BOUND)) == set(MAY_IMPORT)
    assert {room_of(path) for path in SOURCES} - FREE - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", ON_THE_PATH, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_of_a_round_is_on_a_page(path: Path) -> None:
    assert f"`{path.name}`" in DESIGN or path.name in GPU, "say in docs/design.md what it is for"


def test_every_file_that_the_page_names_is_there() -> None:
    names = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", DESIGN)}
    there = {path.name for folder in (PACKAGE, ROOT / "tests", ROOT / "scripts") for path in folder.rglob("*.py")}
    assert names - there == set()
    assert len(names) > 50
