"""The checkout that the package lies in, if it does: the committed pair, its prompts and a revision are there."""

from __future__ import annotations

from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[2]

CHECKOUT: Path | None = _ABOVE if (_ABOVE / "scripts" / "bench.py").is_file() else None
"""The repository's root; None for an installed package."""

PAIR = (CHECKOUT or Path()) / "assets" / "pair" / "target"
"""The committed pair's target. Where there is no checkout the path leads nowhere, and `Settings.check` says so."""


def in_checkout(path: Path) -> str | None:
    """A path as the repository names it; None for one outside."""
    path = path.resolve()
    return path.relative_to(CHECKOUT).as_posix() if CHECKOUT and path.is_relative_to(CHECKOUT) else None
