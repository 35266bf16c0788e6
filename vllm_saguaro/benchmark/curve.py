"""The gain over the cost ratio: the same benchmark at several depths of target and draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.benchmark.records import SCHEMA, Report
from vllm_saguaro.benchmark.session import measure
from vllm_saguaro.benchmark.settings import Settings
from vllm_saguaro.benchmark.summary import Spread, summarise
from vllm_saguaro.benchmark.tables import number, percent, render, spread


@dataclass(frozen=True)
class Point:
    """One pair on the curve: its cost ratio, saguaro over draft_model at its best K, and the ideal."""

    target_layers: int | None
    draft_layers: int | None
    cost_ratio: float
    baseline: str
    engine: str
    ratio: Spread
    ideal: float | None

    @property
    def layers(self) -> str:
        """Of target and draft, `24:6`."""
        return f"{self.target_layers or 'own'}:{self.draft_layers or 'own'}"


def measure_curve(
    settings: Settings,
    depths: Sequence[tuple[int, int]],
    progress: Callable[[], Progress] = Progress,
    warn: Callable[[str], None] = print,
    done: Callable[[Report, list[Report]], None] | None = None,
) -> list[Report]:
    """One report for each (target layers, draft layers); `done` is called after each, with all so far."""
    reports: list[Report] = []
    for target_layers, draft_layers in depths:
        deeper = dataclasses.replace(settings, target_layers=target_layers, draft_layers=draft_layers)
        reports.append(measure(deeper, progress(), warn))
        if done:
            done(reports[-1], reports)
    return reports


def points_of(report: Report) -> list[Point]:
    """One point per workload: saguaro's fastest configuration against draft_model's."""
    summaries = summarise(report.runs)
    points = []
    for workload in dict.fromkeys(run.workload for run in report.runs):
        by_mode: dict[str, list[str]] = {}
        for run in report.runs:
            if run.workload == workload:
                by_mode.setdefault(run.engine.mode, []).append(run.name)
        if not {"draft_model", "saguaro"} <= by_mode.keys():
            continue
        names = {run.name: run.engine.name for run in report.runs}
        baseline, best = (
            max(by_mode[mode], key=lambda name: summaries[name].tokens_per_second.median)
            for mode in ("draft_model", "saguaro")
        )
        cost_ratio, ratio = summaries[baseline].cost_ratio, summaries[best].over_best
        if cost_ratio is None or ratio is None:
            continue
        points.append(
            Point(
                report.settings["target_layers"],
                report.settings["draft_layers"],
                cost_ratio,
                names[baseline],
                names[best],
                ratio,
                summaries[best].ideal_over_best,
            )
        )
    return points


def curve_text(points: Sequence[Point]) -> str:
    """The curve as a table."""
    headers = ("target:draft layers", "c", "baseline", "saguaro", "ratio", "ideal", "reached")
    rows = [
        (
            point.layers,
            number(point.cost_ratio),
            point.baseline,
            point.engine,
            spread(point.ratio),
            number(point.ideal),
            percent(point.ratio.median / point.ideal if point.ideal else None),
        )
        for point in sorted(points, key=lambda point: point.cost_ratio)
    ]
    return render(headers, rows)


def curve_json(reports: Sequence[Report]) -> dict[str, Any]:
    """All reports whole, and the points that the plot shows."""
    points = [dataclasses.asdict(point) for report in reports for point in points_of(report)]
    return {"schema": SCHEMA, "kind": "curve", "points": points, "reports": [report.to_json() for report in reports]}
