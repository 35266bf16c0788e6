"""Whoever opens a mailbox sees whether it is one, and of the same version and shape: in one line, before anything."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from vllm_saguaro.messages import Stamp, Table
from vllm_saguaro.placement.layout import MOST_C, LayoutError, MailboxShape, c_of_number, c_to_number
from vllm_saguaro.placement.mailbox import DraftState, Mailbox

SHAPE = MailboxShape(slots=3, branches=4, num_speculative_tokens=2, ring_bytes=256, support=3, vocab_size=1000)
SIGNATURE_AT = 64


def made() -> bytearray:
    memory = bytearray(4 * SHAPE.total_bytes)
    Mailbox(memoryview(memory), SHAPE)
    return memory


def test_the_second_to_open_it_finds_what_the_first_one_wrote() -> None:
    memory = made()
    first, second = Mailbox(memoryview(memory), SHAPE), Mailbox(memoryview(memory), SHAPE)
    first.announce(DraftState.READY, 12)
    first.publish(Table(Stamp(2, 1, 0), [1], [999], []))
    found = second.read(2)
    assert found is not None
    assert (found.bonus, second.state, second.max_length) == ([999], DraftState.READY, 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slots", 4),
        ("branches", 3),
        ("num_speculative_tokens", 3),
        ("ring_bytes", 264),
        ("support", 4),
        ("vocab_size", 1001),
        ("device_steps", 1),
        ("rounds", 1),
    ],
)
def test_another_shape_is_refused_by_name(name: str, value: int) -> None:
    memory = made()
    before = bytes(memory)
    with pytest.raises(LayoutError, match=f"{name} {getattr(SHAPE, name)} instead of {value}") as error:
        Mailbox(memoryview(memory), dataclasses.replace(SHAPE, **{name: value}))
    assert "\n" not in str(error.value)
    assert bytes(memory) == before


def test_every_size_is_looked_at() -> None:
    memory, other = made(), MailboxShape(*(value + 8 for value in dataclasses.astuple(SHAPE)))
    with pytest.raises(LayoutError) as error:
        Mailbox(memoryview(memory + bytes(other.total_bytes)), other)
    assert all(field.name in str(error.value) for field in dataclasses.fields(SHAPE))


def test_another_version_is_refused_with_what_to_do() -> None:
    memory = made()
    memory[SIGNATURE_AT] += 1
    with pytest.raises(LayoutError, match=r"layout 6, and here is layout 5: .* same vllm_saguaro"):
        Mailbox(memoryview(memory), SHAPE)


@pytest.mark.parametrize("word", [1, -1, 2**63 - 1, -(2**63), 0x53474D42])
def test_other_memory_is_refused(word: int) -> None:
    memory = made()
    struct.pack_into("<q", memory, SIGNATURE_AT, word)
    with pytest.raises(LayoutError, match="no mailbox"):
        Mailbox(memoryview(memory), SHAPE)


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(LayoutError, match=f"{SHAPE.total_bytes - 1} bytes for a mailbox of {SHAPE.total_bytes}"):
        Mailbox(memoryview(bytearray(SHAPE.total_bytes - 1)), SHAPE)
    Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)


def test_who_joins_a_mailbox_makes_none() -> None:
    Mailbox(memoryview(made()), SHAPE, existing=True)
    memory = bytearray(SHAPE.total_bytes)
    with pytest.raises(LayoutError, match="no mailbox there: magic 0x0"):
        Mailbox(memoryview(memory), SHAPE, existing=True)
    assert not any(memory)


def test_refused_memory_is_let_go_of() -> None:
    memory = made()
    memory[SIGNATURE_AT] += 1
    with memoryview(memory) as view, pytest.raises(LayoutError):
        Mailbox(view, SHAPE)
    memory.append(0)  # raises BufferError while anyone holds a view


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MailboxShape)])
@pytest.mark.parametrize("value", [0, -8, 2**31 + 8, 8.0, "8", None, True])
def test_sizes_that_cannot_be_are_refused_by_name(field: str, value: object) -> None:
    """They may come from the other side."""
    least = 0 if field in ("device_steps", "rounds") else 1
    if value == least == 0:  # no records
        return
    with pytest.raises(ValueError, match=f"{field} {value!r}: give a whole number from {least}"):
        dataclasses.replace(SHAPE, **{field: value})  # type: ignore[arg-type]


def test_a_ring_that_is_not_made_of_whole_words_is_refused() -> None:
    with pytest.raises(ValueError, match="ring_bytes 252: give a multiple of 8"):
        dataclasses.replace(SHAPE, ring_bytes=252)


@pytest.mark.parametrize("c", [None, 0.0, 0.0001, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_a_c_crosses_as_a_number(c: float | None) -> None:
    assert c_of_number(c_to_number(c)) == c


def test_a_c_is_rounded_to_what_can_cross() -> None:
    assert c_of_number(c_to_number(1 / 3)) == 0.3333


@pytest.mark.parametrize("number", [0, -1, MOST_C + 1, 2**63 - 1, -(2**63)])
def test_a_number_that_stands_for_no_c_is_none(number: int) -> None:
    assert c_of_number(number) is None
    assert c_of_number(MOST_C) == 1.0
