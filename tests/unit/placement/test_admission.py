"""Who may join a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.placement.pooled import ask
from vllm_saguaro.placement.admission import Room, check_agreement, check_room
from vllm_saguaro.placement.channel import NotAdmitted

ROOM = Room(engines=3, rows=100, blocks=120, block_size=4, max_length=64)
"""The longest text with its branches takes 16 + 4 * 2 blocks."""


def refusal(check: Callable[..., None], *given: Any) -> NotAdmitted:
    with pytest.raises(NotAdmitted) as found:
        check(*given)
    assert "\n" not in str(found.value)
    return found.value


@pytest.mark.parametrize(
    ("differing", "said"),
    [
        ({"num_speculative_tokens": 5}, "num_speculative_tokens 5 instead of 3"),
        ({"draft_sample_method": "greedy"}, "draft_sample_method 'greedy' instead of 'coupled'"),
        ({"model": {"model": "other", "vocab_size": 40}}, "draft model 'other' instead of 'small'"),
        ({"model": {"model": "small", "vocab_size": 41}}, "draft vocab_size 41 instead of 40"),
        ({"model": {"model": "small", "vocab_size": 40, "dtype": "half"}}, "draft dtype 'half' instead of None"),
    ],
)
def test_what_differs_is_said_in_one_line(differing: dict[str, Any], said: str) -> None:
    found = refusal(check_agreement, ask("b", **differing), ask("a"))
    assert said in str(found)
    assert str(found).count(" instead of ") == 1
    assert found.disagrees


def test_all_that_differs_is_said_at_once() -> None:
    found = refusal(check_agreement, ask("b", num_speculative_tokens=5, draft_sample_method="greedy"), ask("a"))
    assert str(found).count(" instead of ") == 2


def test_what_is_each_engines_own_need_not_agree() -> None:
    other = ask("b", slots=9, branches=7, fan_out="uniform", sampling_c=0.5, cpus=[3], max_length=99)
    check_agreement(other, ask("a"))


def test_there_is_room_for_so_many_engines() -> None:
    check_room(ask(), [ask(), ask()], ROOM)
    found = refusal(check_room, ask(), [ask(), ask(), ask()], ROOM)
    assert "room for 3 engines" in str(found)
    assert not found.disagrees, "it may ask again"


def test_there_is_room_for_so_many_requests() -> None:
    check_room(ask(slots=40), [ask(slots=60)], ROOM)
    found = refusal(check_room, ask(slots=41), [ask(slots=60)], ROOM)
    assert "41 requests" in str(found)
    assert "40 more" in str(found)


def test_there_is_room_where_an_equal_part_of_the_blocks_holds_the_longest_text_of_anybody() -> None:
    check_room(ask(branches=4), [ask(branches=22)], ROOM)  # 16 + 22 * 2 = 60 = 120 / 2
    for one, other in ((4, 23), (23, 4)):
        assert "KV blocks" in str(refusal(check_room, ask(branches=one), [ask(branches=other)], ROOM))
    check_room(ask(branches=99), [], ROOM)  # alone it has all there is


def test_a_text_counts_as_long_as_its_engine_says() -> None:
    check_room(ask(branches=23, max_length=56), [ask()], ROOM)
    assert refusal(check_room, ask(branches=23, max_length=60), [ask(max_length=8)], ROOM)
