from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_saguaro.algorithm import calibration
from vllm_saguaro.algorithm.calibration import (
    BINS,
    HIGHEST,
    LOWEST,
    NUM_CLASSES,
    ORIGINS,
    PRIOR_COVERAGE,
    PRIOR_LINES,
    Calibration,
    Event,
    apply,
    class_name,
    class_of,
    coverage,
)

Array = NDArray[np.float64]

GREEDY = class_of(0.0, coupled=False, certain=True, backup=False)
SAMPLED = class_of(1.0, coupled=False, certain=False, backup=False)
GRID = 1 / (1 + np.exp(-np.linspace(-6, 6, 241)))
"""Scores within the bins, where 20 000 events leave no bin without any."""
CENTRE = 1 / (1 + math.exp(-0.375))
"""A score at the centre of a bin: of the first above 0.5."""

events = st.sampled_from(list(Event))


def estimate(maps: Calibration, cls: int, what: Event, raw: Array) -> Array:
    scores = torch.from_numpy(raw.astype(np.float32)).unsqueeze(0)
    return apply(maps.table(), torch.tensor([cls]), what, scores)[0].double().numpy()


def log_odds(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)


def steep(raw: Array) -> Array:
    """A map far from every prior: sigmoid(2 x - 1)."""
    return 1 / (1 + np.exp(1 - 2 * log_odds(raw)))


def scores(rng: np.random.Generator, count: int) -> Array:
    return 1 / (1 + np.exp(-rng.uniform(-7, 7, count)))


def teach(maps: Calibration, truth: Array, raw: Array, rng: np.random.Generator, cls: int, what: Event) -> None:
    """Events in rounds of 20."""
    for part in range(0, len(raw), 20):
        r = raw[part : part + 20]
        maps.learn(cls, what, r, rng.random(len(r)) < truth[part : part + 20])


def log_loss(p: Array, happened: NDArray[np.bool_]) -> float:
    return float(-np.where(happened, np.log(p), np.log1p(-p)).mean())


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior that takes every score for the probability."""
    lines = {what: dict.fromkeys(by_rule, (1.0, 0.0)) for what, by_rule in PRIOR_LINES.items()}
    monkeypatch.setattr(calibration, "PRIOR_LINES", lines)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_every_class_has_its_own_name() -> None:
    assert len({class_name(cls) for cls in range(NUM_CLASSES)}) == NUM_CLASSES


@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize(
    ("temperature", "name"),
    [
        (1e-5, "T < 0.5"),
        (0.49, "T < 0.5"),
        (0.5, "T < 0.85"),
        (0.85, "T < 1.15"),
        (1.15, "T >= 1.15"),
        (9, "T >= 1.15"),
    ],
)
@pytest.mark.parametrize(
    ("coupled", "certain", "rule"),
    [(False, False, "sampled"), (False, True, "certain"), (True, False, "coupled"), (True, True, "coupled")],
)
def test_the_class_says_temperature_rule_and_origin(
    temperature: float, name: str, coupled: bool, certain: bool, rule: str, backup: bool
) -> None:
    cls = class_of(temperature, coupled, certain, backup)
    assert class_name(cls) == f"{name}, {rule}, {ORIGINS[backup]}"


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_a_greedy_row_is_certain_whatever_is_said(temperature: float, coupled: bool, certain: bool) -> None:
    assert class_name(class_of(temperature, coupled, certain, False)) == "greedy, certain, cache"


@pytest.mark.parametrize("temperature", [-0.1, math.nan])
def test_a_temperature_that_cannot_be_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        class_of(temperature, False, False, False)


@pytest.mark.parametrize("cls", range(NUM_CLASSES))
def test_classes_do_not_leak_into_each_other(cls: int) -> None:
    maps = Calibration()
    before = maps.table()
    for what in (Event.RESIDUAL, Event.BONUS):
        maps.learn(cls, what, np.full(500, 0.3), np.zeros(500, dtype=bool))
        changed = (maps.table() != before).any(dim=-1)
        assert changed.nonzero().tolist() == [[cls, what]]
        before = maps.table()


# --- the prior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", list(Event))
@pytest.mark.parametrize("cls", range(NUM_CLASSES))
def test_the_prior_alone_is_a_line_in_log_odds(cls: int, what: Event) -> None:
    temperature, rule, _ = class_name(cls).split(", ")
    slope, offset = PRIOR_LINES[what]["greedy" if temperature == "greedy" else rule]
    x = np.linspace(-8.5, 8.5, 300)
    # log-odds of p = slope x + offset, as far as estimates go
    expected = np.clip(1 / (1 + np.exp(-slope * x - offset)), LOWEST, HIGHEST)
    got = estimate(Calibration(), cls, what, 1 / (1 + np.exp(-x)))
    assert log_odds(got) == pytest.approx(log_odds(expected), abs=0.05)  # 1 - p is coarse in float32


def test_the_prior_goes_by_event_and_rule_and_greedy_rows_have_one_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Calibration().table()
    greedy = [cls for cls in range(NUM_CLASSES) if class_name(cls).startswith("greedy,")]
    coupled = [cls for cls in range(NUM_CLASSES) if ", coupled," in class_name(cls) and cls not in greedy]
    for rule, concerned in (("coupled", coupled), ("greedy", greedy)):
        lines = {what: dict(by_rule) for what, by_rule in PRIOR_LINES.items()}
        lines[Event.BONUS][rule] = (2.0, 0.5)
        monkeypatch.setattr(calibration, "PRIOR_LINES", lines)
        maps = Calibration()
        # (.8 / .2)^2 e^.5
        got = log_odds(estimate(maps, concerned[0], Event.BONUS, np.array([0.3, 0.8])))
        assert got == pytest.approx([2 * math.log(3 / 7) + 0.5, 2 * math.log(4) + 0.5], abs=0.01)
        changed = (maps.table() != plain).any(dim=-1).nonzero()
        assert changed.tolist() == [[cls, Event.BONUS] for cls in concerned]
        monkeypatch.undo()


@pytest.mark.parametrize("what", [Event.RESIDUAL, Event.BONUS])
def test_candidates_below_the_bins_keep_their_order_and_proportion(what: Event) -> None:
    raw = np.array([1e-5, 2e-5, 1e-4])
    got = estimate(Calibration(), SAMPLED, what, raw)
    assert got / got[0] == pytest.approx(raw / raw[0], rel=1e-3)


def test_a_flood_of_hopeless_candidates_says_nothing_of_the_others() -> None:
    """A sure distribution has dozens of candidates far below the bins. They fall into the first bin all the same."""
    maps = Calibration()
    raw = np.array([1e-5, 2e-4])
    before = estimate(maps, SAMPLED, Event.RESIDUAL, raw)
    for _ in range(1000):
        maps.learn(SAMPLED, Event.RESIDUAL, np.full(60, 1e-9), np.zeros(60, dtype=bool))
    assert estimate(maps, SAMPLED, Event.RESIDUAL, raw) == pytest.approx(before, rel=0.1)


@pytest.mark.usefixtures("identity")
def test_rare_candidates_survive_a_run_without_a_success() -> None:
    """2000 trials at p = 1/3000: none succeeds half of the time."""
    maps = Calibration()
    maps.learn(SAMPLED, Event.RESIDUAL, np.full(2000, 1 / 3000), np.zeros(2000, dtype=bool))
    assert estimate(maps, SAMPLED, Event.RESIDUAL, np.array([1 / 3000]))[0] > 1 / 3000 / 3


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", list(Event))
def test_a_known_map_is_recovered(what: Event) -> None:
    rng = np.random.default_rng(0)
    maps = Calibration()
    raw = scores(rng, 20_000)
    teach(maps, steep(raw), raw, rng, SAMPLED, what)
    got = estimate(maps, SAMPLED, what, GRID)
    assert np.abs(got - steep(GRID)).max() < 0.05
    assert np.abs(got - steep(GRID)).mean() < 0.015
    assert (np.diff(got) >= 0).all()  # close to 1 float32 has no steps for the tilt of pooled bins
    assert (maps.table()[SAMPLED, what, :BINS].diff() > 0).all()


def test_the_map_follows_a_change() -> None:
    rng = np.random.default_rng(1)
    maps = Calibration(memory=200)
    for truth in (0.9, 0.2):
        raw = np.full(2000, 0.6)
        teach(maps, np.full(2000, truth), raw, rng, SAMPLED, Event.ACCEPTANCE)
        assert estimate(maps, SAMPLED, Event.ACCEPTANCE, raw[:1])[0] == pytest.approx(truth, abs=0.08)


def test_memory_is_a_number_of_trials_of_one_bin() -> None:
    """What came before fades as exp(-trials since / memory); other bins' trials fade nothing."""
    maps = Calibration(memory=500, strength=1e-6)
    yes, no = np.ones(10, dtype=bool), np.zeros(10, dtype=bool)
    for _ in range(200):
        maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(10, CENTRE), yes)
    for _ in range(500):
        maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(10, 0.01), no)
    assert estimate(maps, SAMPLED, Event.ACCEPTANCE, np.array([CENTRE]))[0] > 0.99
    for _ in range(50):
        maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(10, CENTRE), no)
    assert estimate(maps, SAMPLED, Event.ACCEPTANCE, np.array([CENTRE]))[0] == pytest.approx(math.exp(-1), abs=0.01)


@pytest.mark.usefixtures("identity")
def test_strength_is_a_number_of_trials() -> None:
    maps = Calibration(strength=30)
    maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(30, CENTRE), np.arange(30) < 21)
    assert estimate(maps, SAMPLED, Event.ACCEPTANCE, np.array([CENTRE]))[0] == pytest.approx(
        (CENTRE + 0.7) / 2, rel=1e-3
    )


@pytest.mark.parametrize("raw", [0.5, 0.6, 0.65, 0.9, 1.0])
def test_scores_that_never_vary_are_learnt_wherever_they_lie(raw: float) -> None:
    """Also between two centres, whichever of the two is nearer."""
    rng = np.random.default_rng(6)
    maps = Calibration()
    teach(maps, np.full(2000, 0.3), np.full(2000, raw), rng, SAMPLED, Event.ACCEPTANCE)
    assert estimate(maps, SAMPLED, Event.ACCEPTANCE, np.array([raw]))[0] == pytest.approx(0.3, abs=0.04)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("shape", [lambda raw: raw, steep], ids=["prior-right", "prior-wrong"])
@pytest.mark.parametrize("what", [Event.ACCEPTANCE, Event.BONUS])
def test_the_first_rounds_are_good_and_later_ones_better(what: Event, shape: Callable[[Array], Array]) -> None:
    rng = np.random.default_rng(2)
    probe = scores(rng, 50_000)
    happened = rng.random(len(probe)) < shape(probe)
    prior = log_loss(np.clip(probe, LOWEST, HIGHEST), happened)
    losses = {}
    for count in (50, 2000):
        runs = []
        for _ in range(20):
            maps = Calibration()
            raw = scores(rng, count)
            teach(maps, shape(raw), raw, rng, SAMPLED, what)
            runs.append(log_loss(estimate(maps, SAMPLED, what, probe), happened))
        losses[count] = float(np.mean(runs))
    assert losses[50] < prior + 0.01
    if shape is steep:
        assert losses[2000] < prior - 0.02
        assert losses[2000] < log_loss(steep(probe), happened) + 0.01
    else:
        assert losses[2000] < prior + 0.01


@pytest.mark.parametrize("what", [Event.RESIDUAL, Event.BONUS])
def test_what_the_candidates_add_up_to_is_learnt_by_class_and_event(what: Event) -> None:
    """Also where their scores say otherwise; what came before the last `memory` rounds fades."""
    maps = Calibration(memory=100, strength=20)
    raw, classes, rejected = np.array([0.6, 0.3]), torch.tensor([SAMPLED, GREEDY]), torch.tensor([[True, False]] * 2)
    before = coverage(maps.table(), classes, rejected)
    is_first, is_none = np.array([True, False]), np.zeros(2, dtype=bool)
    for i in range(40):
        maps.learn(SAMPLED, what, raw, is_first if i % 4 == 0 else is_none)
    after = coverage(maps.table(), classes, rejected)
    column = 0 if what is Event.RESIDUAL else 1
    prior = PRIOR_COVERAGE[what]["sampled"]
    assert before[0, column].item() == pytest.approx(prior)
    assert after[0, column].item() == pytest.approx((20 * prior + 10) / 60)
    assert after[1].tolist() == before[1].tolist()
    assert after[0, 1 - column] == before[0, 1 - column]
    for _ in range(2000):
        maps.learn(SAMPLED, what, raw, is_first)
    assert coverage(maps.table(), classes, rejected)[0, column].item() == pytest.approx(1, abs=1e-3)


# --- tables and look-ups ---------------------------------------------------------------------------------------------


def test_a_table_is_made_anew_only_after_learning_and_never_changes() -> None:
    maps = Calibration()
    tables, copies = [maps.table()], [maps.table().clone()]
    assert (tables[0].shape, tables[0].dtype) == ((NUM_CLASSES, 3, BINS + 1), torch.float32)
    for _ in range(3):
        assert maps.table() is tables[-1]
        for _ in range(2):  # the second finds the maps of the first one stale
            maps.learn(GREEDY, Event.BONUS, np.full(9, 0.5), np.ones(9, dtype=bool))
        tables.append(maps.table())
        assert not torch.equal(tables[-1], tables[-2])
        copies.append(tables[-1].clone())
    assert all(torch.equal(table, copy) for table, copy in zip(tables, copies, strict=True))


def reference(nodes: list[float], what: Event, raw: float) -> float:
    """One look-up in plain Python: a line between the two nearest centres."""
    width = 18 / BINS
    first, last = -9 + width / 2, 9 - width / 2
    x = math.log(max(raw, 1e-37)) - math.log1p(-min(raw, 1 - 2**-24))
    tail = min(x - first, 0.0) if what is not Event.ACCEPTANCE else 0.0
    x = min(max(x, first), last)
    left = min(int((x - first) / width), BINS - 2)
    weight = (x - first) / width - left
    value = nodes[left] * (1 - weight) + nodes[left + 1] * weight + tail
    return min(max(1 / (1 + math.exp(-value)), LOWEST), HIGHEST)


@pytest.mark.parametrize("what", list(Event))
@pytest.mark.parametrize("shape", [(7,), (7, 4), (7, 5, 3), (7, 0), (0, 4)])
def test_apply_equals_the_scalar_reference(what: Event, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    maps = Calibration()
    for cls in range(NUM_CLASSES):
        raw = scores(rng, 300)
        teach(maps, rng.random() * raw, raw, rng, cls, what)
    generator = torch.Generator().manual_seed(0)
    asked = torch.sigmoid(torch.empty(shape).uniform_(-14, 14, generator=generator))
    if asked.dim() == 2 and asked.numel():
        asked[0] = torch.tensor([0.0, 1.0, 1e-30, 0.5])
    classes = torch.randint(0, NUM_CLASSES, (shape[0],), generator=generator)
    table = maps.table()
    got = apply(table, classes, what, asked)
    assert (got.shape, got.dtype) == (asked.shape, torch.float32)
    for row, cls in enumerate(classes.tolist()):
        expected = [reference(table[cls, what].tolist(), what, r) for r in asked[row].flatten().tolist()]
        assert got[row].flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("identity")
def test_padding_may_hold_nan() -> None:
    raw = torch.tensor([[math.nan, 0.5]])
    got = apply(Calibration().table(), torch.tensor([SAMPLED]), Event.BONUS, raw)
    assert got[0, 0].isnan()
    assert got[0, 1].item() == pytest.approx(0.5)


rounds = st.lists(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40), min_size=1, max_size=8
)


@settings(deadline=None)
@given(rounds, events, st.integers(0, NUM_CLASSES - 1), st.integers(1, 3000), st.integers(1, 40))
def test_whatever_is_learnt_maps_are_monotone_and_within_range(
    learnt: list[list[tuple[float, bool]]], what: Event, cls: int, memory: int, repeated: int
) -> None:
    maps = Calibration(memory=memory)
    for events_of_round in learnt:
        raw, happened = (np.repeat(np.array(column), repeated) for column in zip(*events_of_round, strict=True))
        maps.learn(cls, what, raw, happened)
    nodes = maps.table()[cls, what, :BINS]
    assert nodes.isfinite().all()
    assert (nodes.diff() > 0).all()  # strictly: a top-k orders equal candidates as it likes
    p = estimate(maps, cls, what, 1 / (1 + np.exp(-np.linspace(-40, 20, 400))))
    assert p.min() >= np.float32(LOWEST)
    assert p.max() <= np.float32(HIGHEST)
    assert (np.diff(p) >= -1e-6 * p[1:]).all()
    assert maps.calibration_error(cls, what) >= 0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_pooling_is_the_isotonic_regression(points: list[tuple[float, float]]) -> None:
    """By its closed form: fit_i = max over a <= i of min over b >= i of the weighted mean of a .. b."""
    mean, weight = np.array(points).T
    n = len(mean)
    expected = [
        max(min(np.average(mean[a : b + 1], weights=weight[a : b + 1]) for b in range(i, n)) for a in range(i + 1))
        for i in range(n)
    ]
    assert calibration._isotonic(mean, weight) == pytest.approx(expected, abs=1e-9)


# --- how far off -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("identity")
def test_the_error_is_large_for_a_broken_map_and_small_for_a_good_one() -> None:
    rng = np.random.default_rng(4)
    good, broken = Calibration(), Calibration(strength=1e9)  # one whose prior is never unlearnt
    raw = scores(rng, 20_000)
    for maps in (good, broken):
        teach(maps, 1 - (1 - raw) ** 3, raw, rng, SAMPLED, Event.ACCEPTANCE)
    assert good.calibration_error(SAMPLED, Event.ACCEPTANCE) < 0.02
    expected = np.abs(1 - (1 - raw) ** 3 - raw).mean()
    assert broken.calibration_error(SAMPLED, Event.ACCEPTANCE) == pytest.approx(expected, abs=0.02)
    assert expected > 0.05


@pytest.mark.usefixtures("identity")
def test_what_is_scored_was_predicted_before_it_was_learnt() -> None:
    maps = Calibration()
    errors = []
    for rounds in range(1, 4):
        errors.append(1 - estimate(maps, SAMPLED, Event.ACCEPTANCE, np.array([0.5]))[0])
        maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(100, 0.5), np.ones(100, dtype=bool))
        assert maps.calibration_error(SAMPLED, Event.ACCEPTANCE) == pytest.approx(sum(errors) / rounds, abs=1e-5)
    assert errors[0] == pytest.approx(0.5)
    assert errors[2] < errors[1] < 0.4


@pytest.mark.usefixtures("identity")
def test_old_errors_fade() -> None:
    rng = np.random.default_rng(5)
    maps = Calibration(memory=200)
    maps.learn(SAMPLED, Event.ACCEPTANCE, np.full(200, 0.9), np.zeros(200, dtype=bool))
    assert maps.calibration_error(SAMPLED, Event.ACCEPTANCE) > 0.8
    teach(maps, np.full(4000, 0.3), np.full(4000, 0.9), rng, SAMPLED, Event.ACCEPTANCE)
    assert maps.calibration_error(SAMPLED, Event.ACCEPTANCE) < 0.05


@pytest.mark.usefixtures("identity")
def test_the_error_of_all_classes_weighs_them_by_their_trials() -> None:
    maps = Calibration()
    assert math.isnan(maps.calibration_error(None, Event.BONUS))
    maps.learn(SAMPLED, Event.BONUS, np.full(30, 0.5), np.ones(30, dtype=bool))
    maps.learn(GREEDY, Event.BONUS, np.full(10, 0.1), np.zeros(10, dtype=bool))
    assert maps.calibration_error(GREEDY, Event.BONUS) == pytest.approx(0.1, abs=1e-3)
    assert maps.calibration_error(None, Event.BONUS) == pytest.approx((30 * 0.5 + 10 * 0.1) / 40, abs=1e-3)
    assert math.isnan(maps.calibration_error(GREEDY, Event.ACCEPTANCE))


@pytest.mark.usefixtures("identity")
def test_the_summary_names_what_learnt_something() -> None:
    maps = Calibration()
    assert maps.summary() == {}
    happened = np.array([True, True, True, False])
    maps.learn(SAMPLED, Event.ACCEPTANCE, np.full((2, 2), 0.5), happened.reshape(2, 2))
    maps.learn(SAMPLED, Event.BONUS, np.empty(0), np.empty(0, dtype=bool))
    summary = json.loads(json.dumps(maps.summary()))
    assert list(summary) == ["T < 1.15, sampled, cache"]
    assert summary["T < 1.15, sampled, cache"] == {
        "acceptance": {"trials": 4.0, "rate": 0.75, "error": pytest.approx(0.25, abs=1e-3)}
    }


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_a_score_that_is_no_probability_is_an_error(bad: float) -> None:
    maps = Calibration()
    with pytest.raises(ValueError, match="scores lie in"):
        maps.learn(SAMPLED, Event.BONUS, np.array([0.5, bad]), np.zeros(2, dtype=bool))
    assert maps.summary() == {}


def test_rounding_beyond_one_is_no_error() -> None:
    maps = Calibration()
    maps.learn(SAMPLED, Event.BONUS, np.array([1.0000001, 1.0, 0.0], dtype=np.float32), np.zeros(3, dtype=bool))
    assert maps.table().isfinite().all()


def test_other_mistakes_are_errors() -> None:
    with pytest.raises(ValueError, match="scores, but"):
        Calibration().learn(SAMPLED, Event.BONUS, np.zeros(2), np.zeros(3, dtype=bool))
    for cls in (-1, NUM_CLASSES):
        with pytest.raises(IndexError, match="class"):
            Calibration().learn(cls, Event.BONUS, np.zeros(2), np.zeros(2, dtype=bool))
    with pytest.raises(ValueError, match="positive"):
        Calibration(memory=0)
    with pytest.raises(ValueError, match="positive"):
        Calibration(strength=0)
