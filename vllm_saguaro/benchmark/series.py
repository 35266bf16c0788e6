"""What the pictures of reports show: lines of measured values, found in the runs of one report or of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saguaro.benchmark.forecasts import HITS, ORACLE, shares
from vllm_saguaro.benchmark.records import Report, Run, as_typed
from vllm_saguaro.benchmark.summary import Spread, Summary, summarise


@dataclass
class Line:
    """Values by place on the x axis."""

    label: str
    points: dict[int, Spread] = dataclasses.field(default_factory=dict)
    dashed: bool = False


Panels = dict[str, list[Line]]
"""By the title of the panel."""


@dataclass(frozen=True)
class _Measured:
    run: Run
    summary: Summary


def together(reports: Sequence[Report]) -> list[_Measured]:
    """The runs of all reports, each compared with the others of its own report only: those took turns with it.

    Raises ValueError where a saguaro engine has the same workload in two of them: which one would be shown?
    """
    found: list[_Measured] = []
    seen: set[str] = set()
    for report in reports:
        summaries = summarise(report.runs)
        for run in report.runs:
            if run.engine.mode == "saguaro" and run.name in seen:
                raise ValueError(f"{run.name} is in two of the reports: leave one of them out")
            seen.add(run.name)
            found.append(_Measured(run, summaries[run.name]))
    return found


def batch_panels(reports: Sequence[Report]) -> Panels:
    """Speed over plain by batch: of saguaro and of draft_model, each at its fastest there."""
    fastest: dict[str, dict[str, dict[int, _Measured]]] = {}
    for one in together(reports):
        workload = one.run.workload
        if one.run.engine.mode == "plain" or one.summary.over_plain is None:
            continue
        panel = fastest.setdefault(workload.sampling, {})
        points = panel.setdefault(one.run.engine.mode, {})
        other = points.get(workload.batch)
        if other is None or _speed(one) > _speed(other):
            points[workload.batch] = one
    if not any("saguaro" in panel for panel in fastest.values()):
        raise ValueError("a picture of batches needs a report in which plain and saguaro took turns")
    return {
        name: [
            Line(mode, {batch: over for batch, one in points.items() if (over := one.summary.over_plain)})
            for mode, points in panel.items()
        ]
        for name, panel in fastest.items()
    }


def hit_panels(reports: Sequence[Report]) -> Panels:
    """The hit rate by N: from the engines of different N, and from the forecasts of those that were watched."""
    runs = [one for one in together(reports) if one.run.engine.mode == "saguaro"]
    panels: Panels = {}
    for workload in dict.fromkeys(one.run.workload for one in runs):
        lines: dict[tuple[str, bool], Line] = {}
        for one in runs:
            if one.run.workload != workload:
                continue
            label = dataclasses.replace(one.run.engine, branches=0).name
            for what, found in ((HITS, _hit_rates(one)), (ORACLE, shares(one.summary.forecasts, ORACLE))):
                line = lines.setdefault((label, what == ORACLE), Line(label, dashed=what == ORACLE))
                line.points |= {size: _exactly(share) for size, share in found.items()}
        panels[workload.name] = [line for line in lines.values() if line.points]
    if not any(len(line.points) > 1 for lines in panels.values() for line in lines):
        raise ValueError("a picture of hits needs saguaro engines of at least two --branches (numbers), or --forecasts")
    return panels


def sweep_panels(reports: Sequence[Report]) -> tuple[str, list[str], Panels]:
    """The swept key, its values in order, and four quantities by the place of the value."""
    runs = [one for one in together(reports) if one.run.engine.options]
    keys = list(dict.fromkeys(key for one in runs for key, _ in one.run.engine.options))
    if len(keys) != 1:
        raise ValueError(
            f"a picture of a sweep needs reports of one --sweep key, not of {' and '.join(keys) or 'none'}"
        )
    values = list(dict.fromkeys(as_typed(one.run.engine.options[0][1]) for one in runs))
    several = len({_unswept(one.run) for one in runs}) > 1
    quantities: dict[str, Callable[[Summary], Spread | None]] = {
        "accepted drafts of a round that had some": lambda summary: _exactly_or_none(summary.accepted_per_draft),
        "hit rate": lambda summary: _exactly_or_none(summary.hit_rate),
        "tokens a round": lambda summary: _exactly(summary.tokens_per_round),
        "tokens/s": lambda summary: summary.tokens_per_second,
    }
    panels: Panels = {}
    for name, quantity in quantities.items():
        lines: dict[str, Line] = {}
        for one in runs:
            workload = one.run.workload.name
            label = f"{_unswept(one.run)}, {workload}" if several else workload
            value = quantity(one.summary)
            if value is not None:
                place = values.index(as_typed(one.run.engine.options[0][1]))
                lines.setdefault(label, Line(label)).points[place] = value
        panels[name] = list(lines.values())
    return keys[0], values, panels


def _speed(one: _Measured) -> float:
    return one.summary.tokens_per_second.median


def _hit_rates(one: _Measured) -> dict[int, float]:
    """By N: what was counted of the forecasts, else the hit rate of the engine's own N."""
    found = shares(one.summary.forecasts, HITS)
    branches, rate = one.run.engine.branches, one.summary.hit_rate
    if not found and isinstance(branches, int) and rate is not None:
        found[branches] = rate
    return found


def _unswept(run: Run) -> str:
    return dataclasses.replace(run.engine, options=()).name


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


def _exactly_or_none(value: float | None) -> Spread | None:
    return None if value is None else _exactly(value)
