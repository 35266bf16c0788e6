from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking.answers import Answer, Choice, Fate
from scripts.soaking.references import difference, gap_between, judge
from scripts.soaking.traffic import Asked


def greedy(**body: Any) -> Asked:
    return Asked(0, {"temperature": 0, "max_tokens": 4} | body, "steady")


def answer(*tokens: int, fate: Fate = Fate.FINISHED, **fields: Any) -> Answer:
    text = fields.pop("text", " ".join(map(str, tokens)))
    return Answer(0, fate, choices=(Choice(text, tokens, fields.pop("finish", "length")),), **fields)


def test_equal_answers_do_not_differ() -> None:
    assert difference(answer(1, 2, 3), answer(1, 2, 3)) == ""


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (answer(1, 9, 3), "differs from token 1 on"),
        (answer(1, 2), "2 tokens and length for 3 and length"),
        (answer(1, 2, 3, finish="stop"), "3 tokens and stop for 3 and length"),
        (answer(1, 2, 3, text="other"), "is the same as far as both go"),
        (Answer(0, Fate.FINISHED, choices=()), "0 texts for 1"),
        (Answer(0, Fate.REFUSED, "400: no"), r"refused \(400: no\), plain vLLM: finished"),
    ],
)
def test_every_difference_is_told(ours: Answer, words: str) -> None:
    import re

    assert re.search(words, difference(ours, answer(1, 2, 3)))


def test_a_closed_answer_must_be_the_beginning_of_plain_vllms() -> None:
    closed = answer(1, 2, fate=Fate.CLOSED, finish=None)
    assert difference(closed, answer(1, 2, 3)) == ""
    assert "token 1" in difference(closed, answer(1, 7, 3))
    assert difference(Answer(0, Fate.CLOSED), answer(1, 2, 3)) == ""


def test_refusals_must_have_the_same_words() -> None:
    no, other = Answer(0, Fate.REFUSED, "400: no"), Answer(0, Fate.REFUSED, "400: never")
    assert difference(no, no) == ""
    assert difference(no, other)


def test_a_reference_that_is_no_answer_is_told() -> None:
    assert "no answer" in difference(answer(1), Answer(0, Fate.LOST, "status 500"))


def test_what_plain_vllm_says_too_is_a_tie() -> None:
    ours, theirs = answer(1, 2), answer(1, 3)
    again = judge(greedy(), ours, theirs, [theirs, theirs, ours], None)
    assert again.tie
    assert "1 of 3" in again.why


def test_two_tokens_as_likely_as_each_other_are_a_tie() -> None:
    ours, theirs = answer(1, 2), answer(1, 3)
    logprobs = [[{}, {"token_id:3": -0.69314, "token_id:2": -0.69315}]]
    gap = gap_between(greedy(), ours, theirs, logprobs)
    assert gap == pytest.approx(1e-5)
    assert judge(greedy(), ours, theirs, [theirs], gap).tie


def test_a_token_that_is_plainly_less_likely_is_wrong() -> None:
    ours, theirs = answer(1, 2), answer(1, 3)
    gap = gap_between(greedy(), ours, theirs, [[{}, {"token_id:3": -0.5, "token_id:2": -0.51}]])
    again = judge(greedy(), ours, theirs, [theirs], gap)
    assert not again.tie
    assert "token 1" in again.why


@pytest.mark.parametrize(
    "asked",
    [
        greedy(temperature=1, seed=1),
        greedy(repetition_penalty=1.2),
        Asked(0, {"temperature": 0}, "alone", refused=True),
    ],
)
def test_no_gap_where_log_probabilities_do_not_decide(asked: Asked) -> None:
    logprobs = [[{}, {"token_id:3": -0.5, "token_id:2": -0.5}]]
    assert gap_between(asked, answer(1, 2), answer(1, 3), logprobs) is None


def test_no_gap_to_a_token_that_is_not_among_the_likeliest() -> None:
    assert gap_between(greedy(), answer(1, 2), answer(1, 3), [[{}, {"token_id:3": -0.5}]]) is None
