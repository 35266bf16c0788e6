from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.benchmark.test_bench_reports import SAGUARO, make_report
from vllm_saguaro.benchmark import tables
from vllm_saguaro.benchmark.compare import compare_text, differences, ratio
from vllm_saguaro.benchmark.curve import curve_json, curve_text, points_of
from vllm_saguaro.benchmark.records import Engine
from vllm_saguaro.benchmark.summary import Spread, summarise


def test_columns_are_aligned() -> None:
    assert tables.render(("a", "number"), [("long name", "1"), ("b", "22")]).splitlines() == [
        "a          number",
        "---------  ------",
        "long name       1",
        "b              22",
    ]


def test_how_values_are_written() -> None:
    assert tables.spread(Spread(1.234, 1.0, 2.0)) == "1.23 [1.00-2.00]"
    assert tables.spread(Spread(1.0, 1.0, 1.0)) == "1.00"
    assert tables.short_time(0.0000312) == "31 us"
    assert tables.short_time(0.0023) == "2.30 ms"
    assert tables.acceptance([1.0, 0.5, 0.0]) == "1.00 .50 .00"
    assert tables.same_text([4, 4]) == "yes"
    assert tables.same_text([3, 4]) == "no: 3/4"
    assert tables.percent(0.256) == "26 %"
    nothing = [tables.spread(None), tables.short_time(None), tables.acceptance([]), tables.same_text(None)]
    assert nothing == ["-"] * 4


def test_the_report_names_its_origin_and_every_engine() -> None:
    report = make_report()
    report.notes.append("somebody was busy")
    text = tables.report_text(report, summarise(report.runs))
    assert "Some Processor (avx2), vLLM 0.32.0+cpu, revision 0123456789 with changes" in text
    assert "target assets/pair/target (24 layers), draft assets/pair/target/draft (own layers)" in text
    assert "warning: somebody was busy" in text
    speeds = next(line for line in text.splitlines() if line.startswith(SAGUARO.name))
    assert " ".join(speeds.split()[4:]) == "225.0 [150.0-300.0] 3.00 1.50 1.50 2.50 75 % 20 us yes"


def test_the_demo_shows_one_line_an_engine() -> None:
    report = make_report()
    lines = tables.demo_table(report.runs, summarise(report.runs)).splitlines()
    assert len(lines) == 2 + len(report.runs)
    assert lines[-1].split()[4:] == ["225.0", "3.00", "2.50", "75", "%", "20", "us", "yes"]


def test_two_reports_are_compared_by_configuration() -> None:
    before, after = make_report(), make_report(speed_up=2.0)
    found = ratio(before.runs[0], after.runs[0])
    assert found == Spread(2.0, 1.0, 4.0)
    before.runs.pop(1)
    text = compare_text(before, after)
    assert "differs" not in text
    assert [line.split(",")[0] for line in text.splitlines()[2:]] == ["plain", "draft_model K=4", SAGUARO.name]
    assert all(line.endswith("2.00 [1.00-4.00]        yes") for line in text.splitlines()[2:])


def test_what_makes_reports_incomparable_is_said() -> None:
    before, after = make_report(), make_report()
    after.settings["tokens"] = 96
    after.provenance["processor"] = {"model": "Another", "flags": []}
    found = differences(before, after)
    assert found[0] == "tokens: 51 / 96"
    assert found[1].startswith("processor: ")
    assert compare_text(before, after).startswith("differs: tokens: 51 / 96\n")


def test_settings_that_older_reports_lack_had_their_defaults() -> None:
    before, after = make_report(), make_report()
    after.settings |= {"top_p": [1.0], "sweep": {}, "forecasts": False}
    assert differences(before, after) == []
    after.settings["top_p"] = [0.9]
    assert differences(before, after) == ["top_p: [1.0] / [0.9]"]


def test_reports_without_a_common_configuration() -> None:
    before, after = make_report(), make_report()
    before.runs = before.runs[:1]
    after.runs = after.runs[1:]
    assert compare_text(before, after) == "no configuration is in both files"


def test_the_curve_takes_the_best_of_both_modes() -> None:
    report = make_report()
    (point,) = points_of(report)
    assert (point.baseline, point.engine) == ("draft_model K=4", SAGUARO.name)
    assert point.cost_ratio == summarise(report.runs)[report.runs[2].name].cost_ratio
    assert "24:own" in curve_text([point])
    assert curve_json([report])["points"][0]["ratio"]["median"] == 1.5


def test_a_report_without_both_modes_gives_no_point() -> None:
    report = make_report()
    report.runs = [run for run in report.runs if run.engine == Engine("plain")]
    assert points_of(report) == []
