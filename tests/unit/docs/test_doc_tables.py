"""Pages that list what the source lists have all of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_pages import ROOT
from vllm_saguaro import config
from vllm_saguaro.vllm_hooks.draft_choice import FAMILIES, Family


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def first_cells(text: str) -> set[str]:
    """The code in the first cell of every row of every table."""
    return {code for cell in re.findall(r"^\| ([^|]*)", text, re.MULTILINE) for code in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("key", [*config.OWN_KEYS, *config.VLLM_KEYS])
def test_every_key_has_a_row_in_the_options(key: str) -> None:
    assert key in first_cells(page("options.md"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_of_the_table_is_shown_with_its_draft(family: Family) -> None:
    rows = [line for line in page("choosing_a_draft.md").splitlines() if f"`{family.draft}`" in line]
    assert rows, f"{family.draft} is not there"
    assert family.in_name or any(str(size) in row or "the same" in row for row in rows for size in family.vocab_sizes)


def test_a_key_without_a_row_would_be_noticed() -> None:
    assert "branches" in first_cells("| `branches` | `auto` |\n")
    assert "auto" not in first_cells("| `branches` | `auto` |\n")
