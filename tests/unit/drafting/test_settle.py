"""What an outcome leaves in a trunk beside text and KV, and what is learnt from it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.drafting.checks import (
    COUPLED,
    GREEDY,
    PROMPT,
    SAMPLED,
    SEEDED,
    check_blocks,
    check_drafts,
    check_predictions,
    grown,
    make_engine,
    prefill,
    ready,
    speculation,
)
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import PLAIN, Deflation, Trunk
from vllm_saguaro.messages import Sampling

K = 3


class Observed:
    """Stands in for the engine's `pace` and `deflations`, and keeps what they are told."""

    def __init__(self, engine: DraftEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forecasts: list[tuple[int | None, int, int]] = []
        self.deflations: list[tuple[float, int, int, bool]] = []
        monkeypatch.setattr(engine.pace, "observe_forecast", lambda *seen: self.forecasts.append(seen))
        monkeypatch.setattr(engine.deflations, "learn", lambda *seen: self.deflations.append(seen))


def deflating(c: float = 0.3, **options: Any) -> DraftEngine:
    return make_engine(FakeModel(num_blocks=256), branches=6, deflations=Deflations(K, c), **options)


def next_round(engine: DraftEngine, trunk: Trunk, branch: int = 0) -> None:
    """A hit on a branch; then glue and a new tree."""
    hit = trunk.branches[branch]
    assert engine.settle(trunk, hit.accepted, hit.bonus, speculation(engine, trunk, branch))
    prefill(engine, [trunk])
    grown(engine, [trunk])


def unforeseen(trunk: Trunk) -> int:
    """A bonus token that no branch has at k = 0."""
    return next(token for token in range(40) if trunk.branch_of(0, token) is None)


# ---- deflation and backup -------------------------------------------------------------------------------------------


def test_a_speculation_keeps_the_rule_that_it_was_drawn_by() -> None:
    engine = deflating()
    trunk = ready(engine, sampling=SAMPLED)
    tree = grown(engine, [trunk])
    rule = tree.rule.deflation
    assert rule.c == 0.3
    assert sum(rule.fan_out) > 0
    next_round(engine, trunk)
    assert trunk.deflation == rule
    assert not trunk.backup
    check_predictions(engine, trunk)  # by q and q': without the rule other outcomes would be likeliest
    check_drafts(engine, trunk)
    check_blocks(engine, [trunk])


def test_the_rule_matters_to_what_is_predicted() -> None:
    engine = deflating(0.0)
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    next_round(engine, trunk)
    with_rule = {(branch.accepted, branch.bonus) for branch in trunk.branches}
    trunk.deflation = PLAIN
    grown(engine, [trunk])
    assert with_rule != {(branch.accepted, branch.bonus) for branch in trunk.branches}


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED, SEEDED])
def test_drafts_that_are_not_sampled_have_no_rule(sampling: Sampling) -> None:
    engine = deflating()
    trunk, sampled = ready(engine, sampling=sampling), ready(engine, PROMPT[:5], SAMPLED)
    assert grown(engine, [trunk, sampled]).rule.deflation.c == 0.3  # which a neighbour has
    for each in (trunk, sampled):
        engine.settle(each, 0, each.branches[0].bonus, speculation(engine, each, 0))
    assert trunk.deflation == PLAIN
    assert sampled.deflation.c == 0.3


def test_a_tree_of_others_alone_is_not_deflated() -> None:
    engine = deflating()
    assert grown(engine, [ready(engine), ready(engine, PROMPT[:5], COUPLED)]).rule.deflation == PLAIN


def test_drafts_from_elsewhere_are_a_backup_and_have_no_rule() -> None:
    engine = deflating()
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    next_round(engine, trunk)
    assert not engine.settle(trunk, 0, unforeseen(trunk), [1, 2])
    assert (trunk.backup, trunk.deflation) == (True, PLAIN)
    prefill(engine, [trunk])
    grown(engine, [trunk])
    check_predictions(engine, trunk)
    next_round(engine, trunk)
    assert not trunk.backup  # the next ones are the draft's own again
    engine.settle(trunk, 0, unforeseen(trunk), [])
    assert (trunk.backup, trunk.deflation) == (False, PLAIN)


def test_each_c_that_is_chosen_goes_with_its_own_tree() -> None:
    engine = make_engine(FakeModel(num_blocks=256), branches=6, deflations=Deflations(K, "auto"))
    trunk = ready(engine, sampling=SAMPLED)
    seen = set[Deflation]()
    grown(engine, [trunk])
    for _ in range(40):
        assert trunk.tree is not None
        rule = trunk.tree.rule.deflation
        check_drafts(engine, trunk)
        seen.add(rule)
        next_round(engine, trunk)
        assert trunk.deflation == rule
        if len(trunk.tokens) > 50:
            engine.release(trunk)
            trunk = ready(engine, sampling=SAMPLED)
            grown(engine, [trunk])
    assert len(seen) > 1


# ---- what is learnt -------------------------------------------------------------------------------------------------


def test_an_outcome_is_observed_once_with_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deflating()
    observed = Observed(engine, monkeypatch)
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    next_round(engine, trunk, branch=2)
    third = trunk.branches[3]
    engine.settle(trunk, third.accepted, third.bonus, [])
    engine.settle(trunk, 0, 7, [])  # nothing was predicted in between
    assert observed.forecasts == [(2, 0, 0), (3, third.accepted, K)]
    assert trunk.forecast is None


def test_unless_said_otherwise_all_drafts_were_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deflating()
    trunk = ready(engine)
    grown(engine, [trunk])
    next_round(engine, trunk)
    observed = Observed(engine, monkeypatch)
    engine.settle(trunk, 0, unforeseen(trunk), [])
    assert observed.forecasts == [(None, 0, K)]


@pytest.mark.parametrize("predicted", [True, False])
def test_what_came_of_a_sampled_speculation_is_learnt_for_its_c(
    predicted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deflating()
    observed = Observed(engine, monkeypatch)
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    next_round(engine, trunk)
    assert observed.deflations == []  # there was no speculation yet
    branch = trunk.branches[1]
    accepted, bonus = (branch.accepted, branch.bonus) if predicted else (0, unforeseen(trunk))
    engine.settle(trunk, accepted, bonus, [])
    assert observed.deflations == [(0.3, accepted, K, predicted)]


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_of_other_speculations_nothing_is_learnt_for_c(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deflating()
    observed = Observed(engine, monkeypatch)
    trunk = ready(engine, sampling=sampling)
    grown(engine, [trunk])
    next_round(engine, trunk)
    next_round(engine, trunk)
    assert observed.deflations == []


def test_of_a_backup_nothing_is_learnt_for_c(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deflating()
    observed = Observed(engine, monkeypatch)
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    engine.settle(trunk, 0, unforeseen(trunk), [1, 2])
    prefill(engine, [trunk])
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, [])
    assert observed.deflations == []
    assert len(observed.forecasts) == 2


def test_an_outcome_that_was_drafted_just_in_time_was_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its branch is there when the outcome comes, but only since the outcome was known."""
    engine = deflating()
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    next_round(engine, trunk)
    observed = Observed(engine, monkeypatch)
    bonus = unforeseen(trunk)
    tree = engine.pursue([(trunk, 0, bonus)], 2)
    assert tree is not None
    engine.grow(tree)
    assert engine.settle(trunk, 0, bonus, speculation(engine, trunk, 0))
    assert observed.forecasts == [(None, 0, K)]
    assert observed.deflations == [(0.3, 0, K, False)]


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_of_settled_positions_is_given_up() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine, sampling=SEEDED)
    assert trunk.noise is not None
    grown(engine, [trunk])
    next_round(engine, trunk)
    first = len(trunk.tokens) - len(PROMPT)
    assert first == 1
    trunk.noise.at(first)
    with pytest.raises(IndexError):
        trunk.noise.at(first - 1)


def test_a_request_that_comes_again_with_more_text_has_the_noise_of_its_positions() -> None:
    engine = make_engine(FakeModel(num_blocks=256))
    first = ready(engine, sampling=SEEDED)
    grown(engine, [first])
    next_round(engine, first)
    engine.settle(first, 0, unforeseen(first), [])
    again = engine.admit(list(first.tokens), first.sampling)
    prefill(engine, [first, again])
    grown(engine, [first, again])
    assert [(b.accepted, b.bonus) for b in first.branches] == [(b.accepted, b.bonus) for b in again.branches]
    assert speculation(engine, first, 0) == speculation(engine, again, 0)
    check_drafts(engine, again)


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_an_outcome_beyond_the_branches_that_there_were_is_no_hit_of_its_c(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More outcomes are ranked than get a branch: C is to be judged by those that did."""
    engine = deflating()
    observed = Observed(engine, monkeypatch)
    trunk = ready(engine, sampling=SAMPLED)
    grown(engine, [trunk])
    hit = trunk.branches[0]
    assert engine.settle(trunk, hit.accepted, hit.bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    assert engine.fork([trunk], 2) is not None
    assert len(trunk.branches) == 2
    assert trunk.forecast is not None
    accepted, bonus = trunk.forecast.ranked[rank]
    engine.settle(trunk, accepted, bonus, [])
    assert observed.deflations == [(0.3, accepted, K, rank < 2)]
    assert observed.forecasts[-1] == (rank, accepted, K)
