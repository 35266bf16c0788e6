from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.benchmark.test_bench_reports import (
    DRAFT_3,
    DRAFT_4,
    GREEDY,
    PLAIN,
    SAGUARO,
    make_repetition,
    make_report,
)
from vllm_saguaro.benchmark.records import Engine, Run, Workload
from vllm_saguaro.benchmark.summary import Spread, paired, summarise, summarise_alone


def test_spread_of_values() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_ratios_are_paired_by_repetition() -> None:
    # Both halve their speed in the second repetition: the ratio does not change.
    runs = {run.engine: run for run in make_report().runs}
    assert paired(runs[SAGUARO], runs[DRAFT_4]) == Spread(1.5, 1.5, 1.5)


def test_comparison_with_plain_with_the_same_k_and_with_the_best_k() -> None:
    summaries = {run.engine: summarise(make_report().runs)[run.name] for run in make_report().runs}
    saguaro = summaries[SAGUARO]
    assert saguaro.over_plain is not None
    assert saguaro.over_plain.median == pytest.approx(3.0)
    assert saguaro.over_same_k is not None
    assert saguaro.over_same_k.median == pytest.approx(1.5)
    assert saguaro.best_k == 4
    slower = summaries[DRAFT_3]
    assert slower.over_best is not None
    assert slower.over_best.median == pytest.approx(0.75)
    assert summaries[PLAIN].over_best is None


@pytest.mark.parametrize("order", [(200.0, 100.0), (100.0, 200.0)])
def test_the_faster_of_two_baselines_with_one_k_counts(order: tuple[float, float]) -> None:
    ways = [Engine("draft_model", 4, sampling=way) for way in ("greedy", "probabilistic")]
    saguaro = Run(SAGUARO, GREEDY, [make_repetition(300.0)])
    runs = [Run(way, GREEDY, [make_repetition(speed)]) for way, speed in zip(ways, order, strict=True)]
    summary = summarise([*runs, saguaro])[saguaro.name]
    assert summary.over_same_k is not None
    assert summary.over_best is not None
    assert summary.over_same_k.median == summary.over_best.median == pytest.approx(1.5)


def test_times_of_a_draft_model_round() -> None:
    run = next(run for run in make_report().runs if run.engine == DRAFT_4)
    summary = summarise_alone(run)
    # 100 tokens at 200 and at 100 tokens/s in 40 steps each; 3/7 of it drafting, so c = 3/4.
    assert summary.step_seconds == pytest.approx(1.5 / 80)
    assert summary.drafting_seconds == pytest.approx(1.5 / 80 * 3 / 7)
    assert summary.cost_ratio == pytest.approx(0.75)
    assert summary.tokens_per_round == pytest.approx(2.5)


def test_what_saguaro_counts() -> None:
    summary = summarise_alone(next(run for run in make_report().runs if run.engine == SAGUARO))
    assert summary.hit_rate == pytest.approx(0.75)
    assert summary.misses == {"not_predicted": 16, "absent": 4}
    assert summary.late_tables == 2
    assert summary.acceptance == [1, 1, 0, 0]
    assert summary.verify_seconds == pytest.approx(0.010)
    assert summary.draft_round_seconds == pytest.approx(0.008)
    assert summary.target_wait_seconds == pytest.approx(20e-6)


def test_the_ideal_is_the_formula_with_the_measured_numbers() -> None:
    report = make_report()
    saguaro = summarise(report.runs)[report.runs[-1].name]
    # p = 0.75, E_hit = 3, E_miss = 1, T_p = 0.8, T_b = 0: S = 2.5; draft_model: E = 2.5, T_SD = 0.75.
    assert saguaro.ideal_over_same_k == pytest.approx(2.5 / (2.5 / 1.75))
    assert saguaro.reached_same_k == pytest.approx(1.5 / 1.75)
    assert saguaro.reached_best == saguaro.reached_same_k


def test_no_ideal_without_measurements() -> None:
    report = make_report()
    for repetition in report.runs[-1].repetitions:
        repetition.counters.clear()
    saguaro = summarise(report.runs)[report.runs[-1].name]
    assert saguaro.hit_rate is None
    assert saguaro.ideal_over_best is None
    assert saguaro.reached_best is None


@pytest.mark.parametrize(
    "counted",
    [
        {"vllm:saguaro_late_tables": 1000.0},
        {'vllm:saguaro_backups{kind="ngram"}': 1.0},
        {"vllm:saguaro_quiet_steps": 1.0},
    ],
)
def test_no_ideal_where_the_formula_is_not_about_what_happened(counted: dict[str, float]) -> None:
    report = make_report()
    report.runs[-1].repetitions[0].counters |= counted
    saguaro = summarise(report.runs)[report.runs[-1].name]
    assert saguaro.hit_rate is not None
    assert saguaro.ideal_over_same_k is None
    assert saguaro.reached_best is None


def test_same_text_is_counted_over_all_repetitions() -> None:
    run = Run(SAGUARO, GREEDY, [make_repetition(1.0, same_text=2), make_repetition(1.0, same_text=1)])
    assert summarise_alone(run).same_text == [3, 4]
    run.repetitions[0].same_text = None
    assert summarise_alone(run).same_text is None


def test_workloads_are_not_mixed() -> None:
    other = Workload(8, 0.0)
    runs = [
        *make_report().runs,
        Run(PLAIN, other, [make_repetition(10.0)]),
        Run(SAGUARO, other, [make_repetition(20.0)]),
    ]
    summary = summarise(runs)[runs[-1].name]
    assert summary.over_plain == Spread(2.0, 2.0, 2.0)
    assert summary.over_best is None


def test_saguaro_at_a_k_that_draft_model_did_not_run() -> None:
    runs = [
        *make_report().runs[:-1],
        Run(Engine("saguaro", 6, 12, "ranked"), GREEDY, make_report().runs[-1].repetitions),
    ]
    summary = summarise(runs)[runs[-1].name]
    assert summary.over_same_k is None
    assert summary.over_best is not None


def test_one_token_per_request_leaves_no_decode_part() -> None:
    repetition = make_repetition(10.0)
    repetition.rounds = repetition.steps = repetition.decode_tokens = 0
    summary = summarise_alone(Run(DRAFT_4, GREEDY, [repetition]))
    assert summary.tokens_per_round == 0
    assert summary.cost_ratio is None
