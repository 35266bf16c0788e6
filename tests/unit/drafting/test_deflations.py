from __future__ import annotations

import random

import pytest

from vllm_saguaro.algorithm.outcomes import fan_out_from_lengths
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.trunk import PLAIN, Deflation

K = 3
LENGTHS = [0.4, 0.3, 0.2, 0.1]


def always(tokens: float) -> float:
    """A round that takes as long whatever it verifies."""
    return 1.0


CHOICES = (1.0, 0.7, 0.5, 0.3, 0.1)


def test_the_users_c_is_always_used() -> None:
    deflations = Deflations(K, 0.3)
    for _ in range(100):
        deflations.learn(0.3, 0, K, False)
        assert deflations.next(LENGTHS, 12, always) == Deflation(tuple(fan_out_from_lengths(LENGTHS, 12, 1.0)[:K]), 0.3)
    assert deflations.best(always) == 0.3


def test_a_c_of_one_is_ordinary_sampling() -> None:
    deflations = Deflations(K, 1.0)
    assert all(deflations.next(LENGTHS, 12, always) is PLAIN for _ in range(100))


def test_the_fan_out_has_one_entry_a_draft() -> None:
    """Nothing is drawn after the last one: F_K belongs to no draft."""
    deflation = Deflations(K, 0.5).next(LENGTHS, 24, always)
    assert len(deflation.fan_out) == K
    assert sum(deflation.fan_out) < 24
    assert list(deflation.fan_out) == sorted(deflation.fan_out, reverse=True)


@pytest.mark.parametrize("best", CHOICES)
def test_the_c_with_the_most_tokens_wins(best: float) -> None:
    deflations = Deflations(K, "auto")
    for _ in range(3000):
        for c in CHOICES:
            deflations.learn(c, 2, K, c == best)  # as many accepted everywhere, hits with one alone
    assert deflations.best(always) == best


def test_drafts_accepted_count_as_much_as_hits() -> None:
    deflations = Deflations(K, "auto")
    for i in range(5000):
        for c in CHOICES:
            accepted, hits = (3, 2) if c == 0.5 else (1, 4) if c == 0.1 else (0, 5)
            deflations.learn(c, accepted, K, i % 10 < hits)
    # .2 * 3 > .4 * 1 > 0
    assert deflations.best(always) == 0.5


def test_others_are_tried_now_and_then() -> None:
    deflations = Deflations(K, "auto", seed=1)
    drawn = [deflations.next(LENGTHS, 12, always).c for _ in range(4000)]
    share = {c: drawn.count(c) / len(drawn) for c in CHOICES}
    # a tenth of the trees has any of the five
    assert all(share[c] == pytest.approx(0.02, abs=0.01) for c in CHOICES if c != deflations.best(always))
    assert share[deflations.best(always)] == pytest.approx(0.92, abs=0.02)


def test_what_is_chosen_is_told_from_what_is_tried() -> None:
    deflations = Deflations(K, "auto", seed=1)
    assert deflations.chosen is None
    for _ in range(1000):
        deflations.learn(0.5, 3, K, True)
    drawn = set()
    for _ in range(300):
        drawn.add(deflations.next(LENGTHS, 12, always).c)
        assert deflations.chosen == 0.5
    assert drawn == set(CHOICES)


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_the_users_c_is_what_is_chosen(c: float) -> None:
    deflations = Deflations(K, c)
    deflations.next(LENGTHS, 12, always)
    assert deflations.chosen == c


def trees(seed: int) -> list[float]:
    deflations = Deflations(K, "auto", seed)
    return [deflations.next(LENGTHS, 12, always).c for _ in range(300)]


def test_a_choice_has_random_numbers_of_its_own() -> None:
    random.seed(0)
    before = random.getstate()
    first = trees(5)
    assert random.getstate() == before
    random.seed(1)
    assert trees(5) == first
    assert trees(6) != first


def test_what_is_none_of_the_choices_teaches_nothing() -> None:
    deflations = Deflations(K, "auto")
    before = deflations.best(always)
    for _ in range(1000):
        deflations.learn(0.123, 3, K, True)
    assert deflations.best(always) == before


@pytest.mark.parametrize(("per_token", "best"), [(0.0, 0.1), (1.0, 1.0)])
def test_times_decide_between_many_hits_and_many_accepted_drafts(per_token: float, best: float) -> None:
    """H A is .8 and .75: as tokens alone go the former. But its drafts are verified twice as often, for that."""
    deflations = Deflations(K, "auto")
    for i in range(5000):
        deflations.learn(0.1, i % 2, K, i % 5 > 0)
        deflations.learn(0.1, i % 2 + 1, K, i % 5 > 0)
        for c in CHOICES[:-1]:
            deflations.learn(c, 3 if c == 1 else 0, K, i % 4 == 0)
    assert deflations.best(lambda tokens: 1.0 + per_token * tokens) == best


def test_without_times_the_most_tokens_win() -> None:
    deflations = Deflations(K, "auto")
    for i in range(5000):
        for c in CHOICES:
            deflations.learn(c, 1, K, c == 0.5 or i % 2 > 0)
    assert deflations.best(lambda tokens: 0.0) == 0.5
