"""Reports as worlds: one that is made up, and the committed ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.repository import ROOT
from vllm_saguaro.simulation.reports import BRANCHES, ROWS_FACTOR, plan_of, read_report, world_of
from vllm_saguaro.simulation.validation import own_lines
from vllm_saguaro.simulation.world import WorldError

RESULTS = ROOT / "docs" / "results"
POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


def run(mode: str, k: int, step: float, drafting: float = 0.0, **counters: float) -> dict[str, Any]:
    """A hundred steps of one request; `step` and `drafting` in seconds."""
    engine = {"mode": mode, "k": k, "branches": 6 if mode == "saguaro" else 0, "fan_out": ""}
    repetition = {
        "decode_seconds": 100 * step,
        "decode_tokens": 200,
        "rounds": 100,
        "steps": 100,
        "drafting_seconds": 100 * drafting,
        "counters": counters,
        "digests": ["a", "b"],
    }
    return {"engine": engine, "workload": {"batch": 1, "temperature": 0.0}, "repetitions": [repetition, repetition]}


def drafted(rounds: int, *accepted: int) -> dict[str, float]:
    positions = {f"{POSITION}[{j}]": float(count) for j, count in enumerate(accepted)}
    return {"vllm:spec_decode_num_drafts": float(rounds), **positions}


def report(late: int = 10, more: Mapping[str, float] | None = None) -> dict[str, Any]:
    ours = {
        "vllm:saguaro_hits": 90.0,
        "vllm:saguaro_late_tables": float(late),
        "vllm:saguaro_misses{cause=not_predicted}": 10.0,
        "vllm:saguaro_misses{cause=late}": 5.0,
        "vllm:saguaro_verify_seconds.count": 100.0,
        "vllm:spec_decode_num_draft_tokens": 200.0,
        "vllm:saguaro_draft_round_seconds.sum": 0.8,
        "vllm:saguaro_draft_round_seconds.count": 100.0,
        **(more or {}),
    }
    return {
        "provenance": {"date": "2026-11-25T12:00:00+00:00"},
        "settings": {"tokens": 65, "target_layers": 12, "draft_layers": 6},
        "runs": [
            run("plain", 0, 0.010),
            run("draft_model", 2, 0.0168, 0.005, **drafted(100, 70, 50)),
            run("draft_model", 4, 0.0222, 0.009, **drafted(100, 70, 50, 40, 30)),
            run("saguaro", 2, 0.012, **ours),
        ],
    }


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_world_is_read_off_a_report(tmp_path: Path) -> None:
    (bench,) = read_report(write(tmp_path / "made_up.json", report()))
    assert bench.name == "made_up: 12 + 6 layers, batch 1, T=0"
    world = world_of(bench, bench.ours[0])
    assert world.target_pass.at(1) == pytest.approx(0.010)
    assert world.target_pass.at(3) == pytest.approx(0.012), "one token and two drafts a pass"
    assert world.serial_factor == pytest.approx((0.0222 - 0.009) / 0.014)
    assert world.serial_factor < 1, "so the draft's own times stay as they are"
    assert world.draft_pass.at(1) == pytest.approx(0.002)
    assert world.serial_drafting(4) == pytest.approx(0.009)
    assert world.draft_pass.at(6) == pytest.approx((0.008 - 0.001 - 0.002) / 2), "a round less glue and choice"
    assert world.reach == (0.7, 0.5, 0.4, 0.3)
    assert world.hits.at(6) == pytest.approx(0.9), "outcomes whose table was late say nothing of what was predicted"


def test_where_most_tables_are_late_their_times_are_not_taken(tmp_path: Path) -> None:
    (bench,) = read_report(write(tmp_path / "late.json", report(late=89)))
    assert world_of(bench, bench.ours[0]).draft_pass.at(6) == pytest.approx(ROWS_FACTOR * 0.002)


def test_the_plan_is_that_of_the_bench(tmp_path: Path) -> None:
    (bench,) = read_report(write(tmp_path / "old.json", report()))
    plan = plan_of(bench.ours[0])
    assert (plan.engine, plan.k, plan.branches, plan.batch, plan.tokens, plan.waves) == ("ours", 2, 6, 1, 64, True)
    assert not plan.adaptive, "a report from before K was adapted"
    (bench,) = read_report(write(tmp_path / "new.json", report(more={"vllm:saguaro_quiet_steps": 0.0})))
    assert plan_of(bench.ours[0]).adaptive
    assert not plan_of(bench.ours[0]).rests, "of an engine whose draft went on with what came too late"
    (bench,) = read_report(write(tmp_path / "newer.json", {**report(), "provenance": {"date": "2026-11-28T00:00"}}))
    assert plan_of(bench.ours[0]).rests
    assert plan_of(bench.plain).engine == "plain"


def test_n_that_chose_itself_is_taken_for_twelve(tmp_path: Path) -> None:
    data = report()
    data["runs"][3]["engine"]["branches"] = "auto"
    (bench,) = read_report(write(tmp_path / "auto.json", data))
    assert plan_of(bench.ours[0]).branches == BRANCHES


def test_a_pass_of_few_drafts_that_took_long_makes_no_negative_time(tmp_path: Path) -> None:
    data = report(more={"vllm:spec_decode_num_draft_tokens": 10.0})  # 12 ms for 1.05 tokens, where plain's one took 10
    (bench,) = read_report(write(tmp_path / "few.json", data))
    world = world_of(bench, bench.ours[0])
    assert world.target_pass.at(0) == pytest.approx(0.0)
    assert world.target_pass.at(bench.ours[0].tokens_a_pass) == pytest.approx(0.012)


def test_a_report_without_the_time_of_drafting_makes_no_world(tmp_path: Path) -> None:
    data = report()
    for each in data["runs"][1:3]:
        for repetition in each["repetitions"]:
            repetition["drafting_seconds"] = 0.0
    (bench,) = read_report(write(tmp_path / "v2.json", data))
    with pytest.raises(WorldError, match=r"v2: 12 .* has no time of draft_model's drafting: take a report of"):
        world_of(bench, bench.ours[0])


def test_a_report_without_all_three_modes_or_of_an_inline_draft_has_nothing_to_compare(tmp_path: Path) -> None:
    data = report()
    data["runs"][3]["engine"]["options"] = [["placement", "inline"]]
    assert read_report(write(tmp_path / "inline.json", data)) == []
    assert read_report(RESULTS / "hit_rates_ranked.json") == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [1], "settings": {}}'])
def test_what_is_no_report_is_refused_with_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(WorldError, match="no report") as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_our_own_runs_are_predicted_within_a_tenth_but_for_the_three_that_are_explained() -> None:
    names = ("headline_12_4", "headline_12_6", "curve", "batches_1_4", "large_batches_after", "large_batches")
    lines = list(own_lines([RESULTS / f"{name}.json" for name in names]))
    assert len(lines) == 2 * 5 + 6 * 3 + 4 * 3 + 2 * 4
    assert [f"{line.table}, {line.given}" for line in lines if not line.holds] == [
        "batches_1_4: 12 + 6 layers, batch 1, T=0, its own times",
        "batches_1_4: 12 + 6 layers, batch 1, T=0, the times of K=3",
        "large_batches_after: 12 + 6 layers, batch 16, T=1, its own times",
    ]
    assert max(abs(line.error) for line in lines) < 0.18
