from __future__ import annotations

import numpy as np
import pytest

from vllm_saguaro.messages import GONE, Admit, Miss, Noise, Outcome, Release, Sampling, Stamp, Step, Table, Want

STAMP = Stamp(1, 2, 3)
TABLE = Table(STAMP, [0, 0, 1], [7, 8, 7], [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(("outcome", "branch"), [((0, 7), 0), ((0, 8), 1), ((1, 7), 2), ((1, 8), None), ((2, 7), None)])
def test_a_table_finds_the_branch_of_exactly_this_outcome(outcome: tuple[int, int], branch: int | None) -> None:
    assert TABLE.find(*outcome) == branch


def test_the_speculation_of_a_branch_is_as_deep_as_the_table() -> None:
    assert TABLE.speculation(2) == (3, 6)
    assert Table(STAMP, [0], [7], []).speculation(0) == ()


def test_a_speculation_is_of_plain_integers() -> None:
    table = Table(STAMP, [0], [7], [np.array([5], dtype=np.int64)])
    assert type(table.speculation(0)[0]) is int


def test_a_table_whose_keys_do_not_pair_up_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Table(STAMP, [0, 1], [7], []).find(5, 5)


@pytest.mark.parametrize(
    "step",
    [
        Step([Admit(STAMP, Sampling(), (1,))]),
        Step(wants=[Want(STAMP, 0, 1, 2)]),
        Step(outcomes=[Outcome(STAMP, 0, 1, 2, (), 0)]),
        Step(releases=[Release(STAMP)]),
    ],
)
def test_a_step_with_anything_in_it_is_true(step: Step) -> None:
    assert step
    assert not Step()


def test_every_cause_of_a_miss_has_its_own_word() -> None:
    assert {cause.value for cause in Miss} == {"not_predicted", "late", "absent"}


def test_the_stamps_of_the_next_round_and_of_a_request_that_is_gone() -> None:
    assert STAMP.next() == Stamp(1, 2, 4)
    assert STAMP.gone() == Stamp(1, 2, GONE)
    assert STAMP.gone() not in (STAMP, STAMP.next(), Stamp(1, 2, 0))


@pytest.mark.parametrize(
    ("sampling", "greedy", "coupled", "cut"),
    [
        (Sampling(), True, False, False),
        (Sampling(9e-6, noise=Noise.KEY), True, False, False),
        (Sampling(1e-5, noise=Noise.KEY), False, True, False),
        (Sampling(1.0), False, False, False),
        (Sampling(1.0, noise=Noise.SEED), False, True, False),
        (Sampling(1.0, top_k=1), False, False, True),
        (Sampling(1.0, top_p=0.99), False, False, True),
        (Sampling(1.0, min_p=0.01), False, False, True),
    ],
)
def test_what_follows_from_how_a_request_samples(sampling: Sampling, greedy: bool, coupled: bool, cut: bool) -> None:
    assert (sampling.greedy, sampling.coupled, sampling.cut) == (greedy, coupled, cut)
