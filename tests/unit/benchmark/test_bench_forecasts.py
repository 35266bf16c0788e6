from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.benchmark.test_bench_reports import GREEDY, SAGUARO, make_repetition, make_report
from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.algorithm.calibration import BINS, NUM_CLASSES, Calibration, Event, class_of
from vllm_saguaro.algorithm.outcomes import Beliefs, choose, scores
from vllm_saguaro.benchmark import forecasts, tables
from vllm_saguaro.benchmark.forecasts import (
    ACCEPTANCE_BINS,
    HIT_BINS,
    HITS,
    ORACLE,
    PREDICTED,
    Belief,
    CalibrationError,
    ForecastProbe,
)
from vllm_saguaro.benchmark.records import Run
from vllm_saguaro.benchmark.summary import summarise, summarise_alone
from vllm_saguaro.drafting.forecast import Forecast, Forecaster
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.vllm_hooks.benchmark_probes import ForecastWatch

K = 3


ACCEPTANCE, COVERAGE = 0.5, 0.9
"""What `flat_table` says of every draft, and of the three candidates of a position together."""
TOKEN = COVERAGE / 3


def make_forecast() -> Forecast:
    """Candidates 10 j, 10 j + 1, 10 j + 2, 10 j + 3 at position j; the first is the draft there, so never the bonus."""
    tokens = 10 * np.arange(K + 1)[:, None] + np.arange(4)
    raw = np.tile([0.0, 0.2, 0.7, 0.1], (K + 1, 1))
    return Forecast(0, np.array([0.9, 0.8, 0.7]), tokens, raw, [(K, 32), (0, 2), (0, 1)], wanted=3)


def flat_table() -> torch.Tensor:
    """Maps that say the same of every score: the outcomes of `make_forecast` have 0.0375, 0.15 and 0.15."""
    table = torch.full((NUM_CLASSES, len(Event), BINS + 1), torch.logit(torch.tensor(ACCEPTANCE)).item())
    table[..., BINS] = COVERAGE
    return table


def make_forecaster(fan_out: str = "ranked") -> Forecaster:
    """Knows `flat_table` and never learns."""
    forecaster = Forecaster(fan_out)
    forecaster.calibration.table = flat_table  # type: ignore[method-assign]
    return forecaster


def watch(
    outcomes: list[tuple[int, int, int]], forecaster: Forecaster | None = None, branches: int = 3
) -> dict[str, float]:
    forecaster = forecaster or make_forecaster()
    probe = ForecastProbe(forecaster, branches)
    learn = probe.wrap(forecaster.learn)
    for outcome in outcomes:
        learn(make_forecast(), *outcome)
    return probe.counts()


def without_bins(counts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in counts.items() if "bin_" not in name and PREDICTED not in name}


def filled_bins(counts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in counts.items() if "bin_" in name and value}


MIXED = [
    (0, 1, K),  # predicted third, and the second of the candidates at position 0
    (1, 13, K),  # not predicted, but the third of the candidates at position 1
    (1, 2, K),  # a token that is predicted at another position
    (2, 20, K),  # a candidate that was held to be impossible
]


def test_each_outcome_is_held_against_its_forecast() -> None:
    assert without_bins(watch([(K, 32, K)])) == {
        "outcomes": 1,
        "candidates": 1,
        "hits@1": 1,
        "hits@2": 1,
        "hits@3": 1,
        "oracle@1": 1,
        "oracle@2": 1,
        "oracle@3": 1,
    }
    assert without_bins(watch(MIXED)) == {
        "outcomes": 4,
        "candidates": 3,
        "hits@1": 0,
        "hits@2": 0,
        "hits@3": 1,
        "oracle@1": 0,
        "oracle@2": 1,
        "oracle@3": 2,
    }


def test_predicted_is_what_the_table_says_of_the_first_n() -> None:
    predicted = forecasts.shares(watch(MIXED), PREDICTED)
    assert predicted == pytest.approx({1: 0.0375, 2: 0.1875, 3: 0.3375})
    # More branches than there were outcomes to rank.
    assert forecasts.shares(watch(MIXED, branches=4), PREDICTED)[4] == pytest.approx(0.3375)


def test_the_probabilities_are_those_of_the_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(1, K + 1, 6, generator=generator).softmax(-1)
    tokens = torch.stack([torch.randperm(50, generator=generator)[:6] for _ in range(K + 1)])[None]
    n, classes = torch.tensor([K]), torch.tensor([class_of(1.0, False, False, False)])
    beliefs = Beliefs(tokens, share, share, tokens[:, :K, 0], n, classes)
    raw, table = scores(beliefs), Calibration().table()
    chosen = choose("ranked", beliefs, raw, table, 10)
    ranked = list(zip(chosen.accepted[0].tolist(), chosen.bonus[0].tolist(), strict=True))
    accept, places, raws = (x[0].numpy() for x in (raw.accept, tokens, raw.token))
    belief = Belief.of(Forecast(int(classes[0]), accept, places, raws, ranked, wanted=10), table)
    assert belief.ranked == pytest.approx(chosen.probability[0].numpy())
    assert belief.accept.shape == (K,)


def test_a_forecast_without_drafts_has_a_belief() -> None:
    tokens, raw = np.array([[5, 6]]), np.array([[0.9, 0.1]], dtype=np.float32)
    belief = Belief.of(Forecast(0, np.zeros(0, np.float32), tokens, raw, [(0, 6), (0, 5)], wanted=2), flat_table())
    assert belief.accept.size == 0
    assert belief.ranked == pytest.approx([COVERAGE / 2, COVERAGE / 2])
    assert Belief.of(Forecast(0, np.zeros(0), tokens, raw, [], wanted=0), flat_table()).ranked.size == 0


def test_errors_of_predictions_that_are_off_by_a_known_amount() -> None:
    counts = watch(MIXED)
    assert filled_bins(counts) == pytest.approx(
        {
            "bin_count_3": 4,
            "bin_predicted_3": 4 * 0.3375,
            "bin_hits_3": 1,
            "accept_bin_count_5": 8,
            "accept_bin_predicted_5": 4,
            "accept_bin_hits_5": 4,
        }
    )
    hits = CalibrationError.of(counts, HIT_BINS)
    assert hits is not None
    assert hits.error == pytest.approx(0.3375 - 0.25)
    assert hits.noise == pytest.approx(math.sqrt(2 / math.pi * 0.3375 * 0.6625 / 4))
    acceptance = CalibrationError.of(counts, ACCEPTANCE_BINS)
    assert acceptance is not None
    assert acceptance.error == pytest.approx(0)
    assert acceptance.noise == pytest.approx(math.sqrt(2 / math.pi * 0.25 / 8))
    always = CalibrationError.of(watch([(K, 32, K)] * 5), ACCEPTANCE_BINS)
    assert always is not None
    assert always.error == pytest.approx(1 - ACCEPTANCE)


def test_errors_of_several_bins_do_not_cancel() -> None:
    low = {"bin_count_1": 10, "bin_predicted_1": 1.5, "bin_hits_1": 4}
    high = {"bin_count_9": 10, "bin_predicted_9": 10.5, "bin_hits_9": 8}
    error = CalibrationError.of(low | high, HIT_BINS)
    assert error is not None
    assert error.error == pytest.approx((2.5 + 2.5) / 20)
    assert error.noise == pytest.approx(math.sqrt(2 / math.pi * 1.5 * 0.85) / 20)
    assert CalibrationError.of({}, HIT_BINS) is None


def test_what_is_held_to_be_certain_is_in_the_last_bin() -> None:
    certain = flat_table()
    certain[..., :BINS], certain[..., BINS] = 40.0, 1.0
    forecaster = make_forecaster()
    forecaster.calibration.table = lambda: certain  # type: ignore[method-assign]
    sure = make_forecast()
    probe = ForecastProbe(forecaster, 3)
    sure.ranked[:] = [(K, 31), (K, 32), (K, 33)]
    probe.wrap(forecaster.learn)(sure, K, 32, K)
    assert probe.counts()["bin_predicted_9"] == pytest.approx(1, abs=1e-4)


def test_uncalibrated_is_judged_by_the_maps_that_it_chose_by() -> None:
    prior = watch([MIXED[0]], Forecaster("ranked"))
    found = {}
    for fan_out in ("ranked", "uncalibrated"):
        forecaster = Forecaster(fan_out)
        for _ in range(200):
            forecaster.learn(make_forecast(), 0, 3, K)
        found[fan_out] = watch([MIXED[0]], forecaster)
    for name in ("predicted@1", "predicted@3"):
        assert found["uncalibrated"][name] == prior[name]
        assert abs(found["ranked"][name] - prior[name]) > 0.05


def test_what_was_believed_is_of_before_the_outcome_was_learnt() -> None:
    forecaster = Forecaster("ranked")
    belief = Belief.of(make_forecast(), forecaster.calibration.table())
    assert watch([(0, 2, K)], forecaster)["predicted@3"] == belief.ranked.sum()
    assert Belief.of(make_forecast(), forecaster.calibration.table()).ranked.sum() != belief.ranked.sum()


def test_of_what_the_scheduler_cut_short_only_acceptances_are_counted() -> None:
    counts = watch([(2, 22, 2), (1, 12, 2), (0, 2, 0)])
    assert counts["outcomes"] == 0
    assert CalibrationError.of(counts, HIT_BINS) is None
    assert filled_bins(counts) == {"accept_bin_count_5": 4, "accept_bin_predicted_5": 2, "accept_bin_hits_5": 3}


def test_the_learning_goes_on() -> None:
    forecaster = Forecaster("ranked")
    assert ForecastProbe(forecaster, 3).wrap(forecaster.learn)(make_forecast(), 0, 2, K) == 1
    assert forecaster.calibration.summary()


def test_a_prefix_says_what_fewer_branches_would_hit_only_where_it_is_their_choice() -> None:
    assert forecasts.sizes_of("ranked", 12) == (1, 2, 4, 6, 8, 12)
    assert forecasts.sizes_of("uncalibrated", 10) == (1, 2, 4, 6, 8, 10)
    assert forecasts.sizes_of("geometric", 12) == forecasts.sizes_of("uniform", 12) == (12,)


def test_the_inline_draft_side_is_found_below_the_engine() -> None:
    engine = make_engine(FakeModel())
    shape = MailboxShape(slots=2, branches=engine.branches, num_speculative_tokens=4, ring_bytes=1 << 16, support=8)
    llm: object = SimpleNamespace(drafter=SimpleNamespace(speculator=SimpleNamespace(channel=None)))
    llm.drafter.speculator.channel = InlineChannel(lambda: engine, shape)  # type: ignore[attr-defined]
    for name in ("model_runner", "worker", "driver_worker", "model_executor", "engine_core", "engine_core"):
        llm = SimpleNamespace(**{name: llm})
    watched = ForecastWatch(SimpleNamespace(llm_engine=llm))
    before = watched.counts()
    engine.forecaster.learn(make_forecast(), 0, 2, K)
    assert (before["outcomes"], watched.counts()["outcomes"]) == (0, 1)


def make_watched_run() -> Run:
    run = Run(SAGUARO, GREEDY, [make_repetition(10.0), make_repetition(10.0)])
    for repetition in run.repetitions:
        repetition.forecasts = {"outcomes": 4, "candidates": 4}
        repetition.forecasts |= {"hits@1": 1, "hits@12": 2, "oracle@1": 2, "oracle@12": 3}
    return run


def predictions(hits: float) -> dict[str, float]:
    return {"predicted@1": 1.2, "predicted@12": 2.2, "bin_count_5": 4, "bin_predicted_5": 2.2, "bin_hits_5": hits}


def test_counts_are_added() -> None:
    summary = summarise_alone(make_watched_run()).forecasts
    assert summary["outcomes"] == 8
    assert forecasts.shares(summary, HITS) == {1: 0.25, 12: 0.5}
    assert forecasts.shares(summary, ORACLE) == {1: 0.5, 12: 0.75}
    assert forecasts.shares({}, HITS) == forecasts.shares({"outcomes": 0, "hits@1": 0}, HITS) == {}


def test_errors_are_of_all_repetitions_together() -> None:
    run = make_watched_run()
    for repetition, hits in zip(run.repetitions, (1, 3), strict=True):
        repetition.forecasts |= predictions(hits)
    error = CalibrationError.of(summarise_alone(run).forecasts, HIT_BINS)
    assert error is not None
    assert error.error == pytest.approx(0.4 / 8)  # not the mean of 1.2 / 4 and 0.8 / 4


def test_the_table_is_there_where_somebody_watched() -> None:
    report = make_report()
    assert "forecasts" not in tables.report_text(report, summarise(report.runs))
    report.runs[-1] = run = make_watched_run()
    for repetition in run.repetitions:
        repetition.forecasts |= predictions(2)
    lines = tables.report_text(report, summarise(report.runs)).splitlines()
    header, _, *rows = lines[lines.index("forecasts, in percent:") + 1 :]
    assert header.split()[:6] == ["engine", "hits", "N=1", "N=12", "outcomes", "candidates"]
    assert rows[0].startswith(SAGUARO.name)
    measured, predicted, oracle = (row.removeprefix(SAGUARO.name).split() for row in rows)
    assert measured == ["measured", "25.0", "50.0", "8", "100.0", "5.0", "14.0", "-", "-"]
    assert predicted == ["predicted", "30.0", "55.0"]
    assert oracle == ["oracle", "50.0", "75.0"]


def test_reports_from_before_there_were_predictions_can_be_printed() -> None:
    run = make_watched_run()
    for repetition in run.repetitions:
        repetition.forecasts |= {"error_acceptance": 0.1, "error_bonus": 0.01}
    report = make_report()
    report.runs[-1] = run
    summaries = summarise(report.runs)
    assert not any(name.startswith("error_") for name in summaries[run.name].forecasts)
    measured, predicted, _ = tables.report_text(report, summaries).splitlines()[-3:]
    assert measured.removeprefix(SAGUARO.name).split() == ["measured", "25.0", "50.0", "8", "100.0", *"----"]
    assert predicted.split() == ["predicted", "-", "-"]
