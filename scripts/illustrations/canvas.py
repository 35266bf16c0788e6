"""What all illustrations share: a figure without a display, and one colour for each side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display; chosen before pyplot is loaded

from matplotlib import pyplot

TARGET = "#9ecae1"
DRAFT = "#a1d99b"
QUIET = "#dddddd"
MISS = "#d62728"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, with one axes."""
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def new_drawing(width: float, height: float, right: float, top: float) -> tuple[Any, Any]:
    """The same without ticks and frame; x from 0 to `right`, y from 0 to `top`."""
    figure, axes = new_figure(width, height)
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.set_axis_off()
    return figure, axes


def box(axes: Any, left: float, bottom: float, width: float, height: float, colour: str, **style: Any) -> None:
    """A filled rectangle with a thin edge."""
    style = {"edgecolor": "0.35", "linewidth": 0.8, **style}
    axes.add_patch(pyplot.Rectangle((left, bottom), width, height, facecolor=colour, **style))


def save(figure: Any, path: Path) -> Path:
    """As PNG, without anything that differs from one day to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return path
