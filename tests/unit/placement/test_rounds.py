"""Rounds in a mailbox: what is told comes out, in its order; what cannot be does not."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.messages import Round, Work
from vllm_saguaro.placement.layout import ROUND_WORDS, MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox
from vllm_saguaro.placement.rounds import LONGEST

ROOM = 4
SHAPE = MailboxShape(
    slots=2, branches=5, num_speculative_tokens=2, ring_bytes=64, support=3, vocab_size=100, rounds=ROOM
)
words = st.integers(-(2**63), 2**63 - 1)
likely = st.integers(-2, 12) | st.integers(10**9, 10**9 + 9) | words


def one(number: int) -> Round:
    began = 1000 * number
    return Round(Work.ROUND, began, began + 10, began + 20, began + 400, number, 5)


def sides() -> tuple[Mailbox, Mailbox]:
    memory = memoryview(bytearray(SHAPE.total_bytes))
    return Mailbox(memory, SHAPE), Mailbox(memory, SHAPE, existing=True)


def put(draft: Mailbox, *rounds: Round) -> None:
    assert draft.note is not None
    for each in rounds:
        draft.note(each)


def test_rounds_come_as_they_were_told_and_once() -> None:
    draft, target = sides()
    assert target.rounds() == []
    told = [one(1), dataclasses.replace(one(2), work=Work.PURSUIT), Round(Work.PROMPT, 5, 7, 7, 7, 300, 0)]
    put(draft, *told[:2])
    assert target.rounds() == told[:2]
    put(draft, told[2])
    assert target.rounds() == [told[2]]
    assert target.rounds() == []


@pytest.mark.parametrize("count", [ROOM, ROOM + 1, 3 * ROOM + 2])
def test_a_reader_that_is_too_slow_has_the_newest(count: int) -> None:
    draft, target = sides()
    put(draft, one(1))
    target.rounds()
    put(draft, *map(one, range(2, 2 + count)))
    assert target.rounds() == [one(number) for number in range(2 + count - ROOM, 2 + count)]


def test_nobody_asks_where_there_is_no_room() -> None:
    shape = dataclasses.replace(SHAPE, rounds=0)
    box = Mailbox(memoryview(bytearray(shape.total_bytes)), shape)
    assert (box.note, box.rounds()) == (None, [])
    assert SHAPE.total_bytes - shape.total_bytes == 8 * (1 + ROOM * ROUND_WORDS)
    assert SHAPE.rounds_at == shape.total_bytes


def test_a_round_that_is_overwritten_while_it_is_read_is_none() -> None:
    draft, target = sides()
    put(draft, one(1), one(2))
    rounds = target._rounds
    assert rounds is not None
    rounds._words[rounds._at(1)] = 0  # the writer has begun anew
    assert target.rounds() == [one(2)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"work": 0},
        {"work": 4},
        {"began": 0},
        {"began": 2000},
        {"glued": 1021},
        {"forked": 1401},
        {"ended": 1019},
        {"ended": 1001 + LONGEST},
        {"rows": -1},
        {"rows": 2**31},
        {"branches": 6},
        {"branches": -1},
    ],
)
def test_what_cannot_be_is_left_out(wrong: dict[str, int]) -> None:
    draft, target = sides()
    put(draft, dataclasses.replace(one(1), **wrong), one(2))  # type: ignore[arg-type]
    assert target.rounds() == [one(2)]


@given(st.lists(likely, min_size=1 + ROOM * ROUND_WORDS, max_size=1 + ROOM * ROUND_WORDS))
def test_any_words_are_sound_rounds_or_none(found: list[int]) -> None:
    _, target = sides()
    rounds = target._rounds
    assert rounds is not None
    for at, word in enumerate(found):
        rounds._words[at] = word
    taken = target.rounds() + target.rounds()
    assert len(taken) <= ROOM
    for each in taken:
        assert 0 < each.began <= each.glued <= each.forked <= each.ended <= each.began + LONGEST
        assert 0 <= each.branches <= SHAPE.branches
        assert 0 <= each.rows < 2**31


def test_one_writes_while_the_other_reads() -> None:
    draft, target = sides()
    many = 20_000
    writer = threading.Thread(target=lambda: put(draft, *map(one, range(1, many + 1))))
    writer.start()
    found: list[Round] = []
    while writer.is_alive():
        found += target.rounds()
    writer.join()
    found += target.rounds()
    assert found == [one(each.rows) for each in found]
    numbers = [each.rows for each in found]
    assert numbers == sorted(set(numbers))
    assert numbers[-ROOM:] == list(range(many - ROOM + 1, many + 1))


def test_the_memory_is_let_go_of() -> None:
    memory = bytearray(SHAPE.total_bytes)
    box = Mailbox(memoryview(memory), SHAPE)
    put(box, one(1))
    box.close()
    memory.append(0)  # raises BufferError while anyone holds a view
