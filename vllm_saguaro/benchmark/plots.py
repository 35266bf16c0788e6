"""Pictures of a report, of a curve, and of what reports have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from vllm_saguaro.algorithm.timing import ideal_ratio
from vllm_saguaro.benchmark.curve import Point
from vllm_saguaro.benchmark.records import Report
from vllm_saguaro.benchmark.series import Line, batch_panels, hit_panels, sweep_panels
from vllm_saguaro.benchmark.summary import Spread, Summary

matplotlib.use("Agg")  # no display; chosen before pyplot is loaded

from matplotlib import pyplot

COLOURS = {"plain": "0.6", "draft_model": "tab:orange", "saguaro": "tab:green"}


def plot_speeds(report: Report, summaries: dict[str, Summary], path: Path) -> Path:
    """Tokens per second of every run, one bar each, with the spread."""
    names = [run.name if len({run.workload for run in report.runs}) > 1 else run.engine.name for run in report.runs]
    speeds = [summaries[run.name].tokens_per_second for run in report.runs]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.45 * len(names)), layout="constrained")
    axes.barh(
        names,
        [speed.median for speed in speeds],
        xerr=_reach(speeds),
        color=[COLOURS[run.engine.mode] for run in report.runs],
        capsize=3,
    )
    for row, speed in enumerate(speeds):
        axes.text(0, row, f" {speed.median:.0f}", va="center", ha="left")
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second (median; bars: smallest and largest)")
    depths = {name: report.settings[f"{name}_layers"] for name in ("target", "draft")}
    deepened = "".join(f", {name} deepened to {layers} layers" for name, layers in depths.items() if layers)
    axes.set_title(_title(report.settings) + deepened, fontsize=9)
    return _save(figure, path)


def plot_curve(points: Sequence[Point], settings: dict[str, Any], path: Path) -> Path:
    """Saguaro over draft_model at its best K against the cost ratio, measured and ideal."""
    points = sorted(points, key=lambda point: point.cost_ratio)
    costs = [point.cost_ratio for point in points]
    ratios = [point.ratio for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    grid = [step / 100 for step in range(int(100 * max([1.3, *costs])) + 1)]
    axes.plot(grid, [ideal_ratio(cost) for cost in grid], color="0.8", label="every round a hit: (1 + c) / max(1, c)")
    ideal = [(point.cost_ratio, point.ideal) for point in points if point.ideal is not None]
    if ideal:
        axes.plot(
            *zip(*ideal, strict=True), "--", color="tab:blue", label="ideal: formula with measured hits and times"
        )
    axes.errorbar(
        costs,
        [ratio.median for ratio in ratios],
        yerr=_reach(ratios),
        color=COLOURS["saguaro"],
        marker="o",
        capsize=3,
        label="measured",
    )
    for point in points:
        axes.annotate(
            point.layers, (point.cost_ratio, point.ratio.median), (4, -12), textcoords="offset points", fontsize=7
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("cost ratio c: K drafting steps / verify pass (of draft_model at its best K)")
    axes.set_ylabel("saguaro / draft_model at its best K")
    axes.set_title(f"{_title(settings)}; points: layers of target:draft", fontsize=9)
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_batches(reports: Sequence[Report], path: Path) -> Path:
    """Tokens per second over plain by batch, each mode with its fastest engine, a panel for each way of sampling."""
    panels = batch_panels(reports)
    figure, rows = _panels(len(panels), sharey=True)
    batches = sorted({x for lines in panels.values() for line in lines for x in line.points})
    for axes, (name, lines) in zip(rows, panels.items(), strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for line in lines:
            _draw(axes, line, COLOURS[line.label])
        axes.set_title(name, fontsize=9)
        _log2(axes, batches)
        axes.set_xlabel("requests at once")
    rows[0].set_ylabel("tokens/s over plain (bars: smallest, largest)")
    rows[0].legend(fontsize=8)
    figure.suptitle(_title(reports[0].settings), fontsize=9)
    return _save(figure, path)


def plot_hits(reports: Sequence[Report], path: Path) -> Path:
    """The hit rate by the number of branches, a line for each fan-out, with the oracle where forecasts were watched."""
    panels = hit_panels(reports)
    figure, rows = _panels(len(panels), sharey=True)
    sizes = sorted({x for lines in panels.values() for line in lines for x in line.points})
    colours = _colours(line.label for lines in panels.values() for line in lines)
    for axes, (name, lines) in zip(rows, panels.items(), strict=True):
        for line in lines:
            _draw(axes, line, colours[line.label])
        axes.set_title(name, fontsize=9)
        _log2(axes, sizes)
        axes.set_xlabel("branches N")
    watched = any(line.dashed for lines in panels.values() for line in lines)
    rows[0].set_ylabel("hit rate" + (" (dashed: had k been known)" if watched else ""))
    rows[0].legend(fontsize=8)
    figure.suptitle(_title(reports[0].settings), fontsize=9)
    return _save(figure, path)


def plot_sweep(reports: Sequence[Report], path: Path) -> Path:
    """What the values of one swept key give: accepted drafts, hits, tokens a round and a second."""
    key, values, panels = sweep_panels(reports)
    figure, rows = _panels(len(panels))
    colours = _colours(line.label for lines in panels.values() for line in lines)
    for axes, (name, lines) in zip(rows, panels.items(), strict=True):
        for line in lines:
            _draw(axes, line, colours[line.label])
        axes.set_xticks(range(len(values)), values)
        axes.set_xlabel(key)
        axes.set_title(name, fontsize=9)
    rows[0].legend(fontsize=8)
    figure.suptitle(_title(reports[0].settings), fontsize=9)
    return _save(figure, path)


PLOTS: dict[str, Callable[[Sequence[Report], Path], Path]] = {
    "batches": plot_batches,
    "hits": plot_hits,
    "sweep": plot_sweep,
}
"""The kinds of pictures that can be made of reports."""


def _panels(count: int, **shared: bool) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(
        1, count, figsize=(1 + 3.6 * count, 4), layout="constrained", squeeze=False, **shared
    )
    return figure, list(axes[0])


def _draw(axes: Any, line: Line, colour: Any) -> None:
    points = sorted(line.points.items())
    values = [value for _, value in points]
    axes.errorbar(
        [x for x, _ in points],
        [value.median for value in values],
        yerr=_reach(values),
        color=colour,
        linestyle="--" if line.dashed else "-",
        marker="" if line.dashed else "o",
        markersize=4,
        capsize=3 if any(value.low < value.high for value in values) else 0,
        label=None if line.dashed else line.label,
    )


def _reach(values: Sequence[Spread]) -> list[list[float]]:
    """Error bars from the smallest to the largest."""
    return [[value.median - value.low for value in values], [value.high - value.median for value in values]]


def _log2(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label, the same in all panels."""
    return {label: f"C{number % 10}" for number, label in enumerate(dict.fromkeys(labels))}


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['target']}, {settings['prompts']} prompts x {settings['tokens']} tokens, {settings['dtype']}"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
