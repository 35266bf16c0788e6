from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_saguaro.algorithm.priors import Priors

PRIORS = Priors((0.02, 0.001), (0.002, 0.0001), 0.003, (0.8, 0.6), ((1, 0.5), (12, 0.9), (24, 0.95)))


def test_it_survives_json() -> None:
    assert Priors.from_dict(json.loads(json.dumps(PRIORS.to_dict()))) == PRIORS


def test_beyond_what_is_known_the_last_chance_goes_on() -> None:
    assert PRIORS.chances(1) == [0.8]
    assert PRIORS.chances(4) == [0.8, 0.6, 0.6, 0.6]


@pytest.mark.parametrize(("branches", "share"), [(1, 0.5), (11, 0.5), (12, 0.9), (23, 0.9), (24, 0.95), (256, 0.95)])
def test_the_hit_rate_is_that_of_the_largest_n_up_to_it(branches: int, share: float) -> None:
    assert PRIORS.hit_rate(branches) == share


def test_below_the_smallest_n_its_rate_is_taken() -> None:
    assert Priors((1, 0), (1, 0), 0, (1,), ((4, 0.7),)).hit_rate(1) == 0.7


def test_a_pass_takes_its_base_and_each_token() -> None:
    assert PRIORS.target_seconds(10) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_pass": [0.1]}, "target_pass must be two times"),
        ({"target_pass": [0, 0]}, "target_pass must be two times"),
        ({"target_pass": [-1, 2]}, "target_pass must be two times"),
        ({"draft_step": [0.1, float("inf")]}, "draft_step must be two times"),
        ({"draft_step": ["a", 1]}, "draft_step must be two times"),
        ({"glue": True}, "glue must be a time"),
        ({"acceptance": []}, "acceptance must be numbers"),
        ({"acceptance": [1.1]}, "acceptance must be numbers"),
        ({"hits": []}, "hits must be pairs"),
        ({"hits": [[2, 0.5], [2, 0.6]]}, "hits must be pairs"),
        ({"hits": [[0, 0.5]]}, "hits must be pairs"),
        ({"hits": [[1, 1.5]]}, "shares from 0 to 1"),
        ({"hits": 7}, "numbers and lists"),
        ({"glue": None}, "glue must be a time"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Priors.from_dict({**PRIORS.to_dict(), **changes})


def test_every_key_must_be_there_and_no_other() -> None:
    data = PRIORS.to_dict()
    with pytest.raises(ValueError, match="must have the keys"):
        Priors.from_dict({**data, "more": 1})
    del data["glue"]
    with pytest.raises(ValueError, match="must have the keys"):
        Priors.from_dict(data)
