from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import bench
from tests.unit.benchmark.test_bench_reports import SAGUARO, make_repetition, make_report, saguaro_counters
from vllm_saguaro.benchmark.plots import PLOTS
from vllm_saguaro.benchmark.records import Engine, Report, Run, Workload
from vllm_saguaro.benchmark.series import batch_panels, hit_panels, sweep_panels
from vllm_saguaro.benchmark.summary import Spread
from vllm_saguaro.cli.bench_command import PICTURES

WARM = Workload(8, 1.0, 0.9)


def at_batch(batch: int) -> Report:
    """What `make_report` has, as if that many requests had been asked at once."""
    report = make_report()
    for run in report.runs:
        run.workload = Workload(batch, 0.0)
    return report


def of_engines(*engines: Engine, workload: Workload = WARM) -> Report:
    """Runs in which the first engine hits 20 of 40, the next 21, and so on."""
    report = make_report()
    report.runs = [
        Run(engine, workload, [make_repetition(10.0 + number, counters=saguaro_counters(hits=20 + number))])
        for number, engine in enumerate(engines)
    ]
    return report


def swept(*values: float | str) -> list[Engine]:
    return [dataclasses.replace(SAGUARO, options=(("sampling_c", value),)) for value in values]


def branches(*counts: int | str, fan_out: str = "ranked") -> list[Engine]:
    return [Engine("saguaro", 4, count, fan_out) for count in counts]


def test_batches_show_each_mode_at_its_fastest_over_plain() -> None:
    panels = batch_panels([at_batch(1), at_batch(4)])
    assert list(panels) == ["T=0"]
    points = {line.label: line.points for line in panels["T=0"]}
    assert points == {  # draft_model runs at 1.5 and at 2.0 of plain
        "draft_model": {1: Spread(2.0, 2.0, 2.0), 4: Spread(2.0, 2.0, 2.0)},
        "saguaro": {1: Spread(3.0, 3.0, 3.0), 4: Spread(3.0, 3.0, 3.0)},
    }


def test_hits_are_lines_by_fan_out() -> None:
    report = of_engines(*branches(6, 12), *branches(6, 12, fan_out="uniform"), *branches("auto"))
    (lines,) = hit_panels([report]).values()
    assert {line.label: {n: value.median for n, value in line.points.items()} for line in lines} == {
        "saguaro K=4 ranked": {6: 20 / 40, 12: 21 / 40},
        "saguaro K=4 uniform": {6: 22 / 40, 12: 23 / 40},
    }


def test_forecasts_give_a_line_from_one_engine_and_the_oracle() -> None:
    report = of_engines(*branches(12))
    report.runs[0].repetitions[0].forecasts = {"outcomes": 10, "hits@1": 4, "hits@12": 8, "oracle@1": 6, "oracle@12": 9}
    measured, oracle = hit_panels([report])[WARM.name]
    assert (measured.dashed, oracle.dashed) == (False, True)
    assert {n: value.median for n, value in measured.points.items()} == {1: 0.4, 12: 0.8}
    assert {n: value.median for n, value in oracle.points.items()} == {1: 0.6, 12: 0.9}


def test_a_sweep_keeps_the_order_of_its_values() -> None:
    first, second = of_engines(*swept(1, 0.5)), of_engines(*swept("auto"))
    key, values, panels = sweep_panels([first, second])
    assert (key, values) == ("sampling_c", ["1", "0.5", "auto"])
    (line,) = panels["hit rate"]
    assert line.label == WARM.name
    assert {place: value.median for place, value in line.points.items()} == {0: 20 / 40, 1: 21 / 40, 2: 20 / 40}
    assert {len(lines) for lines in panels.values()} == {1}


@pytest.mark.parametrize(
    ("kind", "reports"),
    [
        ("batches", [at_batch(1), at_batch(16)]),
        ("hits", [of_engines(*branches(6, 12)), of_engines(*branches(6, 12), workload=Workload(8, 0.0))]),
        ("sweep", [of_engines(*swept(0.5, 1, "auto"))]),
    ],
)
def test_a_picture_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, reports: list[Report]
) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(len(reports))]
    for report, path in zip(reports, paths, strict=True):
        report.write(path)
    for words, picture in ((["--plot", str(tmp_path / "new" / "a.png")], "new/a.png"), ([], f"0_{kind}.png")):
        bench.main(["plot", kind, *map(str, paths), *words])
        assert capsys.readouterr().out == f"written to {tmp_path / picture}\n"
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "engines", "complaint"),
    [
        ("batches", branches(12), "plain and saguaro"),
        ("hits", branches(12), "at least two --branches"),
        ("hits", branches("auto"), "at least two --branches"),
        ("hits", [], "at least two --branches"),
        ("sweep", branches(12), "one --sweep key, not of none"),
        ("sweep", [dataclasses.replace(SAGUARO, options=(("x", 1), ("y", 2)))], "not of x and y"),
    ],
)
def test_a_report_without_what_the_picture_needs(
    tmp_path: Path, kind: str, engines: list[Engine], complaint: str
) -> None:
    path = tmp_path / "report.json"
    of_engines(*engines).write(path)
    with pytest.raises(SystemExit, match=rf"^bench\.py: a picture of .*{complaint}[^\n]*$"):
        bench.main(["plot", kind, str(path)])


def test_the_same_run_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="is in two of the reports"):
        hit_panels([of_engines(*branches(6, 12)), of_engines(*branches(12, 24))])


def test_every_kind_can_be_asked_for() -> None:
    assert tuple(PLOTS) == PICTURES
