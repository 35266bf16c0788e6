"""Variants of a module with an error planted: as the source is, but for one place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def planted(
    module: ModuleType, change: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModuleType, Path]:
    """The module with the text `change[0]` replaced by `change[1]`, and its file. The text must be there once."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(change[0]) == 1, f"{change[0]!r} is not once in {module.__name__}: plant another error"
    path = folder / f"planted_{Path(module.__file__).name}"
    path.write_text(source.replace(*change), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    variant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, variant)  # dataclasses look their module up
    spec.loader.exec_module(variant)
    return variant, path
