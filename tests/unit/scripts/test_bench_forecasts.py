from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.benchmark import forecasts, tables
from scripts.benchmark.forecasts import HITS, ORACLE, ForecastProbe
from scripts.benchmark.records import Run
from scripts.benchmark.summary import summarise, summarise_alone
from scripts.benchmark.worker import ForecastWatch
from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.scripts.test_bench_reports import GREEDY, SAGUARO, make_repetition, make_report
from vllm_saguaro.algorithm.calibration import Calibration, Event
from vllm_saguaro.drafting.forecast import Forecast, Forecaster
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.mailbox import MailboxShape

K = 3


def make_forecast() -> Forecast:
    """Candidates 10 j, 10 j + 1, 10 j + 2, 10 j + 3 at position j; the first is the draft there, so never the bonus."""
    tokens = 10 * np.arange(K + 1)[:, None] + np.arange(4)
    scores = np.tile([0.0, 0.2, 0.7, 0.1], (K + 1, 1))
    return Forecast(0, np.array([0.9, 0.8, 0.7]), tokens, scores, [(K, 32), (0, 2), (0, 1)])


def watch(outcomes: list[tuple[int, int, int]], fan_out: str = "ranked", branches: int = 3) -> dict[str, float]:
    probe = ForecastProbe(fan_out, branches)
    learn = probe.wrap(Forecaster(fan_out).learn)
    for outcome in outcomes:
        learn(make_forecast(), *outcome)
    return probe.counts


def test_each_outcome_is_held_against_its_forecast() -> None:
    assert watch([(K, 32, K)]) == {
        "outcomes": 1,
        "candidates": 1,
        "hits@1": 1,
        "hits@2": 1,
        "hits@3": 1,
        "oracle@1": 1,
        "oracle@2": 1,
        "oracle@3": 1,
    }
    counts = watch(
        [
            (0, 1, K),  # predicted third, and the second of the candidates at position 0
            (1, 13, K),  # not predicted, but the third of the candidates at position 1
            (1, 2, K),  # a token that is predicted at another position
            (2, 20, K),  # a candidate that was held to be impossible
        ]
    )
    assert counts == {
        "outcomes": 4,
        "candidates": 3,
        "hits@1": 0,
        "hits@2": 0,
        "hits@3": 1,
        "oracle@1": 0,
        "oracle@2": 1,
        "oracle@3": 2,
    }


def test_what_the_scheduler_cut_short_is_not_counted() -> None:
    assert watch([(2, 22, 2), (0, 2, 0)])["outcomes"] == 0
    assert watch([(1, 12, 2)])["outcomes"] == 1  # a rejection is one, whatever was cut behind it


def test_the_learning_goes_on() -> None:
    probe, forecaster = ForecastProbe("ranked", 3), Forecaster("ranked")
    assert probe.wrap(forecaster.learn)(make_forecast(), 0, 2, K) == 1
    assert forecaster.calibration.summary()


def test_a_prefix_says_what_fewer_branches_would_hit_only_where_it_is_their_choice() -> None:
    assert forecasts.sizes_of("ranked", 12) == (1, 2, 4, 6, 8, 12)
    assert forecasts.sizes_of("uncalibrated", 10) == (1, 2, 4, 6, 8, 10)
    assert forecasts.sizes_of("geometric", 12) == forecasts.sizes_of("uniform", 12) == (12,)


def test_errors_are_of_the_events_that_were_seen() -> None:
    calibration = Calibration()
    calibration.learn(0, Event.BONUS, np.full(10, 0.5), np.ones(10, dtype=bool))
    errors = forecasts.calibration_errors(calibration)
    assert errors == {"error_bonus": calibration.calibration_error(None, Event.BONUS)}


def test_the_inline_draft_side_is_found_below_the_engine() -> None:
    engine = make_engine(FakeModel())
    shape = MailboxShape(slots=2, branches=engine.branches, num_speculative_tokens=4, ring_bytes=1 << 16, support=8)
    llm: object = SimpleNamespace(drafter=SimpleNamespace(speculator=SimpleNamespace(channel=None)))
    llm.drafter.speculator.channel = InlineChannel(lambda: engine, shape)  # type: ignore[attr-defined]
    for name in ("model_runner", "worker", "driver_worker", "model_executor", "engine_core", "engine_core"):
        llm = SimpleNamespace(**{name: llm})
    watched = ForecastWatch(SimpleNamespace(llm_engine=llm))
    before = watched.counts()
    assert watched.errors() == {}
    engine.forecaster.learn(make_forecast(), 0, 2, K)
    assert (before["outcomes"], watched.counts()["outcomes"]) == (0, 1)
    assert watched.errors().keys() == {"error_acceptance", "error_residual"}


def make_watched_run() -> Run:
    run = Run(SAGUARO, GREEDY, [make_repetition(10.0), make_repetition(10.0)])
    for repetition, error in zip(run.repetitions, (0.01, 0.03), strict=True):
        repetition.forecasts = {"outcomes": 4, "candidates": 4, "error_bonus": error}
        repetition.forecasts |= {"hits@1": 1, "hits@12": 2, "oracle@1": 2, "oracle@12": 3}
    return run


def test_counts_are_added_and_errors_averaged() -> None:
    run = make_watched_run()
    run.repetitions[0].forecasts["error_residual"] = 0.5
    summary = summarise_alone(run).forecasts
    assert summary["outcomes"] == 8
    assert summary["error_bonus"] == pytest.approx(0.02)
    assert summary["error_residual"] == 0.5
    assert forecasts.shares(summary, HITS) == {1: 0.25, 12: 0.5}
    assert forecasts.shares(summary, ORACLE) == {1: 0.5, 12: 0.75}
    assert forecasts.shares({}, HITS) == forecasts.shares({"outcomes": 0, "hits@1": 0}, HITS) == {}


def test_the_table_is_there_where_somebody_watched() -> None:
    report = make_report()
    assert "forecasts" not in tables.report_text(report, summarise(report.runs))
    report.runs[-1] = make_watched_run()
    lines = tables.report_text(report, summarise(report.runs)).splitlines()
    header, _, row = lines[lines.index("forecasts, in percent:") + 1 :]
    assert header.split()[:7] == ["engine", "outcomes", "hits@1", "hits@12", "oracle@1", "oracle@12", "candidates"]
    assert row.split()[4:] == ["8", "25.0", "50.0", "50.0", "75.0", "100.0", "-", "-", "2.0"]
