"""Pictures of a report and of a curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from scripts.benchmark.curve import Point
from scripts.benchmark.records import Report
from scripts.benchmark.summary import Summary
from vllm_saguaro.algorithm.timing import ideal_ratio

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
        xerr=[[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]],
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
        yerr=[[ratio.median - ratio.low for ratio in ratios], [ratio.high - ratio.median for ratio in ratios]],
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


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['target']}, {settings['prompts']} prompts x {settings['tokens']} tokens, {settings['dtype']}"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
