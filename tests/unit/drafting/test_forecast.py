from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.drafting.checks import (
    COUPLED,
    GREEDY,
    POSITIONED,
    PROMPT,
    SAMPLED,
    SEEDED,
    check_predictions,
    expected_outcomes,
    fake_of,
    make_engine,
    next_draft,
    noise_at,
    prefill,
)
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.algorithm.calibration import Event, class_name
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.forecast import Forecast, Forecaster
from vllm_saguaro.drafting.trunk import Deflation, Trunk
from vllm_saguaro.messages import Sampling

K = 3


class Lessons:
    """Stands in for the calibration, and keeps what it is told to learn."""

    def __init__(self) -> None:
        self.learnt: list[tuple[int, Event, list[float], list[bool]]] = []

    def learn(self, cls: int, what: Event, raw: np.ndarray, happened: np.ndarray) -> None:
        self.learnt.append((cls, what, raw.tolist(), happened.tolist()))

    def by_event(self) -> dict[Event, tuple[list[float], list[bool]]]:
        return {what: (raw, happened) for _, what, raw, happened in self.learnt if raw}


def forecast_of(n: int = K) -> Forecast:
    """Three candidates a position; the draft x_{j+1} is token 3 j, and cannot be the bonus token at j < n."""
    tokens = np.arange(3 * (n + 1)).reshape(n + 1, 3)
    scores = np.tile([0.0, 0.6, 0.4], (n + 1, 1))
    scores[n] = [0.5, 0.3, 0.2]
    return Forecast(8, np.linspace(0.9, 0.7, n) if n else np.empty(0), tokens, scores, [(0, 1), (n, 3 * n), (0, 2)], 3)


def learn(forecast: Forecast, accepted: int, bonus: int, verified: int) -> tuple[int | None, Lessons]:
    forecaster = Forecaster("ranked")
    lessons: Any = Lessons()
    forecaster.calibration = lessons
    return forecaster.learn(forecast, accepted, bonus, verified), lessons


# ---- learning -------------------------------------------------------------------------------------------------------


def test_a_rejection_teaches_acceptance_up_to_it_and_what_came_instead() -> None:
    _, lessons = learn(forecast_of(), 1, 5, K)
    assert lessons.by_event() == {
        Event.ACCEPTANCE: ([0.9, 0.8], [True, False]),
        Event.RESIDUAL: ([0.6, 0.4], [False, True]),  # of tokens 4 and 5: the draft, token 3, was no candidate
    }
    assert {cls for cls, *_ in lessons.learnt} == {8}


def test_a_first_draft_that_is_rejected_teaches_as_well() -> None:
    _, lessons = learn(forecast_of(), 0, 1, K)
    assert lessons.by_event() == {
        Event.ACCEPTANCE: ([0.9], [False]),
        Event.RESIDUAL: ([0.6, 0.4], [True, False]),
    }


def test_all_accepted_teaches_the_bonus_token() -> None:
    _, lessons = learn(forecast_of(), K, 11, K)
    assert lessons.by_event() == {
        Event.ACCEPTANCE: (pytest.approx([0.9, 0.8, 0.7]), [True] * K),
        Event.BONUS: ([0.5, 0.3, 0.2], [False, False, True]),
    }


def test_a_bonus_token_that_was_no_candidate_is_a_failure_of_all() -> None:
    _, lessons = learn(forecast_of(), K, 39, K)
    assert lessons.by_event()[Event.BONUS] == ([0.5, 0.3, 0.2], [False] * 3)


def test_without_drafts_the_bonus_token_alone_is_learnt() -> None:
    _, lessons = learn(forecast_of(0), 0, 1, 0)
    assert lessons.by_event() == {Event.BONUS: ([0.5, 0.3, 0.2], [False, True, False])}


def test_drafts_that_the_scheduler_left_out_teach_nothing() -> None:
    _, lessons = learn(forecast_of(), 2, 7, 2)  # the bonus token after x_2 is no residual: x_3 was not rejected
    assert lessons.by_event() == {Event.ACCEPTANCE: ([0.9, 0.8], [True, True])}
    _, lessons = learn(forecast_of(), 1, 4, 2)
    assert lessons.by_event() == {
        Event.ACCEPTANCE: ([0.9, 0.8], [True, False]),
        Event.RESIDUAL: ([0.6, 0.4], [True, False]),
    }
    _, lessons = learn(forecast_of(), 0, 1, 0)
    assert lessons.by_event() == {}


def test_the_rank_of_the_outcome() -> None:
    for rank, (accepted, bonus) in enumerate([(0, 1), (K, 9), (0, 2)]):
        assert learn(forecast_of(), accepted, bonus, K)[0] == rank
    assert learn(forecast_of(), 1, 4, K)[0] is None
    assert learn(forecast_of(), K, 1, K)[0] is None  # the token at another length


# ---- predicting -----------------------------------------------------------------------------------------------------


def awaiting(engine: DraftEngine, sampling: Sampling, count: int, prompt: Sequence[int] = PROMPT) -> Trunk:
    """A request with `count` drafts of its own under verification, and its KV complete."""
    trunk = engine.admit(list(prompt), replace(sampling, prompt_length=len(prompt)))
    for _ in range(count):
        trunk.speculation.append(next_draft(fake_of(engine), trunk.sampling, trunk.tokens + trunk.speculation))
    prefill(engine, [trunk])
    return trunk


def predicted(engine: DraftEngine, trunks: list[Trunk]) -> list[Forecast]:
    engine.fork(trunks)
    return [trunk.forecast for trunk in trunks if trunk.forecast is not None]


ALL = [(GREEDY, 2), (COUPLED, 3), (SAMPLED, 0), (SEEDED, 1), (replace(SAMPLED, top_k=3), 3)]


def test_requests_of_every_kind_are_predicted_together_as_alone() -> None:
    together_engine, alone_engine = (make_engine(FakeModel(num_blocks=256, vocab_size=100)) for _ in range(2))
    trunks = [awaiting(together_engine, sampling, count) for sampling, count in ALL]
    trunks[4].deflation = Deflation((2, 1, 1), 0.3)
    for (sampling, count), forecast in zip(ALL, predicted(together_engine, trunks), strict=True):
        trunk = awaiting(alone_engine, sampling, count)
        if sampling.top_k:
            trunk.deflation = Deflation((2, 1, 1), 0.3)
        alone = predicted(alone_engine, [trunk])[0]
        assert (forecast.cls, forecast.ranked) == (alone.cls, alone.ranked)
        assert forecast.tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_allclose(forecast.accept, alone.accept, rtol=1e-5)
        np.testing.assert_allclose(forecast.scores, alone.scores, rtol=1e-4, atol=1e-7)
        assert len(forecast.accept) == count
        assert forecast.tokens.shape == forecast.scores.shape == (count + 1, 64)


def test_outcomes_come_likeliest_first_and_none_is_marked() -> None:
    for fan_out in ("ranked", "geometric", "uniform"):
        engine = make_engine(FakeModel(vocab_size=4), branches=50, fan_out=fan_out)
        trunk = awaiting(engine, GREEDY, 1, [1, 2, 3])
        ranked = predicted(engine, [trunk])[0].ranked
        assert ranked == expected_outcomes(engine, trunk)
        assert len(ranked) <= 3 + 4
        assert all(token >= 0 for _, token in ranked)


@pytest.mark.parametrize("sampling", [COUPLED, SEEDED, POSITIONED])
def test_with_known_noise_a_target_that_equals_the_draft_is_foreseen(sampling: Sampling) -> None:
    """All drafts accepted, and then the token that the noise picks; q alone would often say another."""
    engine, surprising = make_engine(FakeModel(num_blocks=256)), 0
    for start in range(12):
        trunk = awaiting(engine, sampling, K, [(start + 5 * i) % 40 for i in range(6)])
        text = trunk.tokens + trunk.speculation
        bonus = next_draft(fake_of(engine), trunk.sampling, text)
        forecast = predicted(engine, [trunk])[0]
        best = forecast.scores.argmax(-1)
        assert forecast.tokens[K, best[K]] == bonus
        # what is likeliest after a rejection is the runner-up of the race: never the draft
        assert all(forecast.tokens[j, best[j]] != trunk.speculation[j] for j in range(K))
        surprising += bonus != int(fake_of(engine).logits_after(text).argmax())
        engine.release(trunk)
    assert surprising > 0


@pytest.mark.parametrize("sampling", [COUPLED, SEEDED, POSITIONED])
def test_known_noise_sharpens_the_belief(sampling: Sampling) -> None:
    engine = make_engine(FakeModel())
    trunk = awaiting(engine, sampling, 1)
    forecast = predicted(engine, [trunk])[0]
    for j in range(2):
        text = trunk.tokens + trunk.speculation[:j]
        raced = fake_of(engine).logits_after(text) / sampling.temperature + noise_at(trunk.sampling, len(text), 40)
        share = (1.5 * raced).softmax(-1).numpy()  # ~ (q e^g)^1.5
        if j == 0:
            assert forecast.accept[0] == pytest.approx(share[trunk.speculation[0]], rel=1e-4)
        else:
            assert forecast.scores[1] == pytest.approx(share[forecast.tokens[1]], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("sampling", "method", "backup", "name"),
    [
        (GREEDY, "coupled", False, "greedy, certain, cache"),
        (GREEDY, "coupled", True, "greedy, certain, backup"),
        (SAMPLED, "coupled", False, "T < 0.85, sampled, cache"),
        (SAMPLED, "probabilistic", True, "T < 0.85, certain, backup"),
        (SAMPLED, "greedy", False, "T < 0.85, certain, cache"),
        (COUPLED, "coupled", False, "T < 0.85, coupled, cache"),
        (SEEDED, "greedy", True, "T >= 1.15, coupled, backup"),
    ],
)
def test_the_class_of_a_forecast(sampling: Sampling, method: str, backup: bool, name: str) -> None:
    """A backup's drafts have no q, whatever the request's own would have."""
    engine = make_engine(FakeModel(), method=method)
    trunk = awaiting(engine, sampling, K)
    trunk.backup = backup
    assert class_name(predicted(engine, [trunk])[0].cls) == name


# ---- what was learnt comes back -------------------------------------------------------------------------------------


def teach(engine: DraftEngine, forecast: Forecast) -> None:
    """Many rounds in which the first draft was rejected."""
    for _ in range(400):
        engine.forecaster.learn(forecast, 0, int(forecast.tokens[0, 1]), K)


@pytest.mark.parametrize("fan_out", ["ranked", "uncalibrated"])
def test_what_was_learnt_moves_branches_unless_that_is_not_wanted(fan_out: str) -> None:
    engine = make_engine(FakeModel(), branches=8, fan_out=fan_out)
    trunk = awaiting(engine, GREEDY, K)
    before = predicted(engine, [trunk])[0]
    assert before.ranked[0][0] > 0
    teach(engine, before)
    after = predicted(engine, [trunk])[0]
    if fan_out == "ranked":
        assert after.ranked[0] == (0, int(before.tokens[0, 1]))
        check_predictions(engine, trunk)
    else:
        assert after.ranked == before.ranked


def test_one_class_learns_nothing_of_another() -> None:
    engine = make_engine(FakeModel(), branches=8)
    greedy, coupled = awaiting(engine, GREEDY, K), awaiting(engine, COUPLED, K)
    before = predicted(engine, [greedy, coupled])
    teach(engine, before[0])
    after = predicted(engine, [greedy, coupled])
    assert after[0].ranked != before[0].ranked
    assert after[1].ranked == before[1].ranked
