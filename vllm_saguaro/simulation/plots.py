"""Pictures of sweeps. Needs matplotlib, which is imported here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_saguaro.simulation.comparison import NAMES, SWEEPS, Compared


def plot_sweeps(sweeps: Mapping[str, Sequence[Compared]], title: str, path: Path) -> None:
    """A panel a sweep: speed over AR by what is varied, a line an engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False)
    for panel, (name, found) in zip(axes.flat, sweeps.items(), strict=False):
        for engine in dict.fromkeys(compared.result.engine for compared in found):
            line = [(c.value, c.over_plain) for c in found if c.result.engine == engine]
            panel.plot(*zip(*line, strict=True), marker=".", label=NAMES[engine])
        if SWEEPS[name].log:
            panel.set_xscale("log", base=2)
        panel.set_xlabel(SWEEPS[name].title)
        panel.set_ylabel("tokens/s over AR")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    for panel in list(axes.flat)[len(sweeps) :]:
        panel.set_visible(False)
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
