"""Whether an answer can be written where it is asked for: looked at before minutes are spent on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from vllm_saguaro.cli.usage import UsageError

PICTURES: Final = (".png", ".svg", ".pdf")


def check_file(command: str, option: str, path: Path) -> None:
    """Raises UsageError unless the file can be written; folders above it may be missing."""
    place = path if path.exists() else _nearest(path.absolute().parent)
    if path.is_dir() or not (place.is_dir() or place == path) or not os.access(place, os.W_OK):
        raise UsageError(f"{command}: {path} cannot be written: write another file with {option}")


def check_picture(command: str, option: str, path: Path) -> None:
    """Raises UsageError unless a picture can be made of it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{command}: a picture needs matplotlib: pip install matplotlib, or leave {option} out"
        ) from None
    if path.suffix not in PICTURES:
        raise UsageError(f"{command}: {option} {path}: write a name that ends in .png, .svg or .pdf")
    check_file(command, option, path)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
