from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking import client
from scripts.soaking.answers import Answer, Fate
from scripts.soaking.structures import STRUCTURES
from scripts.soaking.traffic import Asked
from tests.unit.scripts.soak_server import SoakServer


def asked(**body: Any) -> Asked:
    usual = {"model": "pair", "prompt": "x = ", "max_tokens": 10, "temperature": 0, "stream": True}
    return Asked(5, usual | body, "steady")


def answer_of(request: Asked, flaw: str = "", piece_seconds: float = 0.0) -> tuple[Answer, list[float]]:
    gaps: list[float] = []

    async def ask() -> Answer:
        server = SoakServer({5: flaw} if flaw else {})
        server.piece_seconds = piece_seconds
        async with server.up(), client.open_session() as session:
            return await client.ask(session, server.url, request, lambda since, now: gaps.append(now - since))

    return asyncio.run(ask()), gaps


def test_a_streamed_answer_is_the_unstreamed_one() -> None:
    streamed, _ = answer_of(asked())
    whole, _ = answer_of(asked(stream=False))
    assert streamed.fate == whole.fate == Fate.FINISHED
    assert streamed.choices == whole.choices
    assert sum(len(choice.tokens) for choice in streamed.choices) == 10
    assert streamed.choices[0].finish == "length"


def test_all_texts_of_a_request_are_kept_apart() -> None:
    answer, _ = answer_of(asked(n=2, temperature=1, seed=1))
    assert [len(choice.tokens) for choice in answer.choices] == [10, 10]
    assert answer.choices[0].tokens != answer.choices[1].tokens


def test_gaps_are_told_between_the_pieces_of_one_text() -> None:
    _, gaps = answer_of(asked(n=2, temperature=1), piece_seconds=0.01)
    assert len(gaps) == 2 * 3  # four pieces each
    assert all(gap > 0.005 for gap in gaps)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("flaw", ["error", "broken", "no end", "error event", "another's", "no reason"])
def test_what_is_no_answer_is_lost_with_a_reason(flaw: str, stream: bool) -> None:
    if flaw == "error event" and not stream:
        pytest.skip("only streams have events")
    answer, _ = answer_of(asked(stream=stream), flaw)
    assert answer.fate == Fate.LOST
    assert answer.reason


def test_an_answer_that_does_not_come_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    answer, _ = answer_of(asked(), "late")
    assert answer.fate == Fate.LOST
    assert answer.reason.startswith("no end after")


def test_a_server_that_is_gone_loses_the_request() -> None:
    async def ask() -> Answer:
        async with client.open_session() as session:
            return await client.ask(session, "http://127.0.0.1:9", asked())

    assert asyncio.run(ask()).fate == Fate.LOST


def test_a_refusal_is_told_with_the_servers_words() -> None:
    answer, _ = answer_of(asked(temperature=-1))
    assert (answer.fate, answer.reason) == (Fate.REFUSED, "400: this cannot be")


def test_a_refusal_may_come_in_the_stream() -> None:
    answer, _ = answer_of(asked(), "no event")
    assert (answer.fate, answer.reason) == (Fate.REFUSED, "400: not so")


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_connection_is_closed_after_so_many_pieces(pieces: int) -> None:
    answer, _ = answer_of(dataclasses.replace(asked(), close_after=pieces))
    assert answer.fate == Fate.CLOSED
    assert sum(len(choice.tokens) for choice in answer.choices) == 3 * pieces


def test_an_answer_that_ends_before_it_would_be_closed_is_finished() -> None:
    answer, _ = answer_of(dataclasses.replace(asked(), close_after=50))
    assert answer.fate == Fate.FINISHED


def test_an_unstreamed_answer_is_given_up_after_a_while() -> None:
    answer, _ = answer_of(dataclasses.replace(asked(stream=False), hold=0.1), piece_seconds=5)
    assert answer.fate == Fate.CLOSED


@pytest.mark.parametrize(("flaw", "words"), [("short", "9 tokens of 10"), ("wrong form", "is not of the form")])
def test_a_finished_answer_of_a_wrong_form_is_complained_about(flaw: str, words: str) -> None:
    answer, _ = answer_of(asked(structured_outputs=STRUCTURES[4]), flaw)
    assert answer.fate == Fate.FINISHED
    assert words in answer.complaint


def test_a_good_answer_is_not_complained_about() -> None:
    answer, _ = answer_of(asked(structured_outputs=STRUCTURES[4]))
    assert answer.complaint == ""


def test_an_answer_survives_the_journal() -> None:
    answer, _ = answer_of(asked(n=2, temperature=1))
    assert Answer.from_json(answer.to_json()) == dataclasses.replace(answer, seconds=round(answer.seconds, 4))
    refused, _ = answer_of(asked(temperature=-1))
    assert Answer.from_json(refused.to_json()).reason == refused.reason
