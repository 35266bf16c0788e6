from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking.pair import MAX_MODEL_LENGTH
from scripts.soaking.settings import Settings
from scripts.soaking.structures import STRUCTURES, departure
from scripts.soaking.traffic import MOODS, Asked, Traffic

MANY = 1500


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic(Settings(seed=3))


@pytest.fixture(scope="module")
def many(traffic: Traffic) -> list[Asked]:
    return [traffic.request(index) for index in range(MANY)]


def test_a_request_is_a_function_of_seed_and_index_alone(many: list[Asked]) -> None:
    again = Traffic(Settings(seed=3, requests=7, concurrency=1))
    assert [again.request(index) for index in reversed(range(0, MANY, 7))] == many[::7][::-1]


def test_another_seed_asks_other_things(many: list[Asked]) -> None:
    other = Traffic(Settings(seed=4))
    assert sum(other.request(index).body == many[index].body for index in range(50)) < 5


def test_the_traffic_has_everything(many: list[Asked]) -> None:
    bodies = [asked.body for asked in many]
    assert {asked.mood for asked in many} == set(MOODS)
    assert {body["temperature"] for body in bodies} >= {0, 0.7, 1}
    assert {body["stream"] for body in bodies} == {True, False}
    for key in ("seed", "top_p", "top_k", "n", "stop", "logprobs", "structured_outputs", "repetition_penalty"):
        assert sum(key in body for body in bodies) > MANY / 100, key
    asked_for = Counter(json.dumps(asked.structure) for asked in many)
    assert all(asked_for[json.dumps(structure)] > 5 for structure in STRUCTURES)
    assert sum(asked.close_after is not None for asked in many) > MANY / 50
    assert sum(asked.hold is not None for asked in many) > MANY / 100
    assert sum(asked.refused for asked in many) > MANY / 100
    assert sum(body["max_tokens"] == 1 for body in bodies) > MANY / 100


def test_prompts_are_of_all_lengths_and_leave_room_for_the_answer(many: list[Asked]) -> None:
    # A text has at most as many tokens as characters.
    sizes = [(len(asked.body["prompt"]), asked.body["max_tokens"]) for asked in many if not asked.refused]
    assert all(size + most <= MAX_MODEL_LENGTH for size, most in sizes)
    assert sum(size <= 12 for size, _ in sizes) > MANY / 20
    assert sum(size + most > MAX_MODEL_LENGTH - 8 for size, most in sizes) > MANY / 50


def test_some_prompts_share_a_long_beginning(many: list[Asked]) -> None:
    begins = Counter(tuple(a.body["prompt"][:96]) for a in many if isinstance(a.body["prompt"], list))
    assert begins.most_common(1)[0][1] > 10


def test_only_greedy_seeded_and_refused_requests_are_comparable(many: list[Asked]) -> None:
    for asked in many:
        decided = asked.refused or asked.body["temperature"] == 0 or "seed" in asked.body
        assert asked.comparable == decided
    assert 0.5 * MANY < sum(asked.comparable for asked in many) < 0.9 * MANY


def test_plain_vllm_is_asked_to_the_end_and_at_once(many: list[Asked]) -> None:
    for asked in many:
        end = asked.to_the_end()
        assert (end.index, end.body, end.close_after, end.hold, end.pause) == (asked.index, asked.body, None, None, 0.0)


@pytest.mark.parametrize(
    ("number", "good", "bad"),
    [
        (0, '{"kind":"file","size":7,"hidden":true}', '{"kind":"pipe","size":7,"hidden":true}'),
        (1, '{"name":"x","tags":["a"]}', '{"name":"x","tags":["a"'),
        (2, "def f(x):", "def f(x)"),
        (3, "2026-11-25", "2026-11-25 "),
        (4, "None", "none"),
    ],
)
def test_a_text_of_another_form_is_told(number: int, good: str, bad: str) -> None:
    assert departure(STRUCTURES[number], good) == ""
    assert bad in departure(STRUCTURES[number], bad)
