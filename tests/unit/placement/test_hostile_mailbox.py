"""A mailbox whose other side has gone mad: whatever is in the memory, what comes out is sound or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.soundness import assert_sound_q, assert_sound_step, assert_sound_table
from tests.unit.placement.strategies import steps_within
from vllm_saguaro.messages import GONE, Proposals, Release, Stamp, Step, Table
from vllm_saguaro.placement.layout import CONTROL_WORDS, MailboxShape
from vllm_saguaro.placement.mailbox import DraftState, Mailbox
from vllm_saguaro.placement.wire import Limits, encode

SHAPE = MailboxShape(slots=2, branches=3, num_speculative_tokens=2, ring_bytes=512, support=4, vocab_size=100)
LIMITS = Limits(SHAPE.slots, SHAPE.num_speculative_tokens, SHAPE.ring_bytes)
HEAD, TAIL, STATE, MAX_LENGTH, ASLEEP, DROPPED, TAKEN, SAMPLING_C = range(8)
SEQUENCE, GENERATION, ROUND, BRANCHES, DEPTH, NANOSECONDS, KEYS = range(7)
STAMP = Stamp(1, 5, 6)
CELL = CONTROL_WORDS + SHAPE.cell_words
"""Where the cell of slot 1 begins."""

words = st.integers(-(2**63), 2**63 - 1)
small = st.integers(-2, 6)
keys = st.builds(lambda k, token: k << 32 | token, st.integers(-1, 4), st.integers(0, 120))
likely = small | st.integers(-5, 110) | keys | words
"""Words that come near to what a cell may have, and any others."""


def mailbox() -> Mailbox:
    return Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)


def publish(box: Mailbox, stamp: Stamp = STAMP, branches: int = 3, q: Proposals | None = None) -> Table:
    """A finished table."""
    accepted, bonus = [i % 3 for i in range(branches)], [90 + i for i in range(branches)]
    rows = [[10 * d + i for i in range(branches)] for d in range(SHAPE.num_speculative_tokens)]
    for depth in range(len(rows) + 1):
        box.publish(Table(stamp, accepted, bonus, rows[:depth], 0.25, newest=q if depth else None))
    table = box.read(stamp.slot)
    assert table is not None
    assert (table.stamp, table.accepted, table.bonus, table.drafts) == (stamp, accepted, bonus, rows)
    return table


# ---- cells ----------------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(st.lists(likely, min_size=SHAPE.cell_words, max_size=SHAPE.cell_words))
def test_any_words_in_a_cell_are_a_sound_table_or_none(cell: list[int]) -> None:
    box = mailbox()
    for at, word in enumerate(cell):
        box._words[CELL + at] = word
    table = box.read(1)
    if table is not None:
        assert_sound_table(table, 1, SHAPE)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SHAPE.cell_words - 1), likely), min_size=1, max_size=3))
def test_any_words_in_place_of_some_of_a_table_are_a_sound_table_or_none(changes: list[tuple[int, int]]) -> None:
    box = mailbox()
    publish(box)
    for at, word in changes:
        box._words[CELL + at] = word
    table = box.read(1)
    if table is not None:
        assert_sound_table(table, 1, SHAPE)


@pytest.mark.parametrize(
    ("at", "word"),
    [
        (SEQUENCE, 3),
        (SEQUENCE, -1),
        (GENERATION, -1),
        (ROUND, GONE - 1),
        (BRANCHES, SHAPE.branches + 1),
        (BRANCHES, -1),
        (BRANCHES, 2**63 - 1),
        (DEPTH, SHAPE.num_speculative_tokens + 1),
        (DEPTH, -1),
        (DEPTH, -(2**63)),
        (NANOSECONDS, -1),
        (NANOSECONDS, 2**62),
        (KEYS + 2, 100),
        (KEYS + 2, -1),
        (KEYS + 2, 3 << 32 | 90),
        (KEYS + 2, -1 << 32 | 90),
        (KEYS + 3, 100),
        (KEYS + 3, -1),
        (KEYS + 8, 100),
        (KEYS + 8, 2**31),
        (KEYS + 8, 2**63 - 1),
    ],
)
def test_one_word_that_cannot_be_makes_a_table_none(at: int, word: int) -> None:
    box = mailbox()
    publish(box)
    box._words[CELL + at] = word
    assert box.read(1) is None


@pytest.mark.parametrize(
    ("at", "word"), [(KEYS + 2, 2 << 32 | 99), (KEYS + 8, 99), (ROUND, GONE), (NANOSECONDS, 3600 * 10**9), (DEPTH, 0)]
)
def test_a_word_at_the_edge_of_what_can_be_leaves_a_table_there(at: int, word: int) -> None:
    box = mailbox()
    publish(box)
    box._words[CELL + at] = word
    table = box.read(1)
    assert table is not None
    assert_sound_table(table, 1, SHAPE)


def test_words_beyond_the_branches_and_the_depth_of_a_table_do_not_matter() -> None:
    box = mailbox()
    table = publish(box, branches=2)
    for at in (KEYS + 2, KEYS + 5, KEYS + 8):
        box._words[CELL + at] = -1
    assert box.read(1) == table


@settings(deadline=None)
@given(st.lists(words, min_size=SHAPE.cell_words, max_size=SHAPE.cell_words))
def test_the_next_table_that_is_published_is_there_whatever_was_in_the_cell(cell: list[int]) -> None:
    box = mailbox()
    for at, word in enumerate(cell):
        box._words[CELL + at] = word
    publish(box)


def test_a_writer_that_ended_in_the_middle_of_the_keys_does_no_harm_to_the_next_one() -> None:
    box = mailbox()
    box._words[CELL + SEQUENCE] = 7
    assert box.read(1) is None
    seen: list[Table | None] = []

    class Spy(list[int]):
        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            seen.append(box.read(1))
            return 1

    box.publish(Table(STAMP, Spy([1, 1]), [1, 2], []))
    assert seen == [None, None]
    assert box.read(1) is not None


# ---- q --------------------------------------------------------------------------------------------------------------

Q = Proposals(
    np.array([[5, 6, 7, 8]] * SHAPE.branches, np.int32),
    np.array([[0.5, 0.25, 0.25, 0.0]] * SHAPE.branches, np.float32),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-2, 102) | st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(width=32), min_size=8, max_size=8),
    st.integers(0, 2),
)
def test_any_numbers_in_the_place_of_a_q_are_a_distribution_or_none(
    tokens: list[int], probabilities: list[float], depth: int
) -> None:
    box = mailbox()
    table = publish(box, q=Q)
    box._q_tokens[1, 0, :, 2] = np.array(tokens).reshape(2, 4)
    box._q_probabilities[1, 0, :, 2] = np.array(probabilities, np.float32).reshape(2, 4)
    found = box.proposals(STAMP, table.version, 2, depth)
    if found is not None:
        assert_sound_q(found, depth, SHAPE)


@pytest.mark.parametrize("value", [np.nan, -0.5, np.inf, 0.75])
def test_a_q_that_is_no_distribution_is_not_there_and_the_others_are(value: float) -> None:
    box = mailbox()
    table = publish(box, q=Q)
    box._q_probabilities[1, 0, 1, 2, 1] = value
    assert box.proposals(STAMP, table.version, 2, 2) is None
    assert box.proposals(STAMP, table.version, 2, 1) is not None, "a depth that is not asked for does not matter"
    assert box.proposals(STAMP, table.version, 1, 2) is not None


def test_a_q_with_a_token_of_no_vocabulary_is_not_there() -> None:
    box = mailbox()
    table = publish(box, q=Q)
    for token in (100, -1, 6):
        box._q_tokens[1, 0, 0, 2, 0] = token
        assert box.proposals(STAMP, table.version, 2, 2) is None
    box._q_tokens[1, 0, 0, 2, 0] = 99
    assert box.proposals(STAMP, table.version, 2, 2) is not None


@pytest.mark.parametrize(("branch", "depth"), [(3, 1), (-1, 1), (0, 3), (0, -1)])
def test_there_is_no_q_beyond_the_shape(branch: int, depth: int) -> None:
    box = mailbox()
    table = publish(box, q=Q)
    assert box.proposals(STAMP, table.version, branch, depth) is None


# ---- ring -----------------------------------------------------------------------------------------------------------


def drain(box: Mailbox) -> list[Step]:
    """All that comes out of a ring; it must come to an end."""
    found: list[Step] = []
    for _ in range(SHAPE.ring_bytes // 8 + 1):
        if not box.has_step:
            return found
        step = box.receive()
        if step is not None:
            found.append(step)
    raise AssertionError("the ring is never empty")


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=SHAPE.ring_bytes, max_size=SHAPE.ring_bytes), words, words | st.integers(-2, 600), words)
def test_any_bytes_in_a_ring_are_sound_steps_or_dropped(ring: bytes, head: int, ahead: int, dropped: int) -> None:
    box = mailbox()
    box._ring[:] = ring
    tail = (head + ahead + 2**63) % 2**64 - 2**63
    box._words[HEAD], box._words[TAIL], box._words[DROPPED] = head, tail, dropped
    for step in drain(box):
        assert_sound_step(step, LIMITS)
    box._words[HEAD] = box._words[TAIL] = 24
    assert box.post(Step(releases=[Release(STAMP)]))
    assert box.receive() == Step(releases=[Release(STAMP)])


@settings(max_examples=100, deadline=None)
@given(st.lists(steps_within(LIMITS), min_size=1, max_size=3), st.data())
def test_damaged_frames_in_a_ring_are_sound_steps_or_dropped(told: list[Step], data: st.DataObject) -> None:
    box = mailbox()
    box._words[HEAD] = box._words[TAIL] = 8 * data.draw(st.integers(0, 200))
    posted = [step for step in told if box.post(step)]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, SHAPE.ring_bytes - 1))
        box._ring[at] ^= 1 << data.draw(st.integers(0, 7))
    found = drain(box)
    for step in found:
        assert_sound_step(step, LIMITS)
    assert len(found) + box.dropped <= len(posted) + SHAPE.ring_bytes // 8


def test_a_length_that_reaches_into_the_padding_of_its_frame_is_refused() -> None:
    box = mailbox()
    step = Step(releases=[Release(STAMP)])
    assert len(encode(step)) % 8
    box.post(step)
    box._words[TAIL] -= 1  # the padding is not there
    assert box.receive() is None
    assert (box.dropped, box.has_step) == (1, False)


@pytest.mark.parametrize(
    ("head", "tail"), [(8, 0), (0, 520), (-8, 0), (0, 2**62), (2**63 - 8, 2**63 - 1), (-(2**63), 2**63 - 1), (0, -1)]
)
def test_ends_of_a_ring_that_cannot_be_take_no_step_and_give_none(head: int, tail: int) -> None:
    box = mailbox()
    box._words[HEAD], box._words[TAIL] = head, tail
    before = bytes(box._buffer)
    assert not box.post(Step(releases=[Release(STAMP)]))
    assert bytes(box._buffer) == before
    assert box.receive() is None
    assert (box.dropped, box.has_step) == (1, False)


@pytest.mark.parametrize(
    "step", [Step(releases=[Release(Stamp(2**31, 1, 0))]), Step(releases=[Release(Stamp(0, 1, 2**63))])]
)
def test_a_step_that_no_frame_can_hold_is_refused_and_raises_nothing(step: Step) -> None:
    box = mailbox()
    assert not box.post(step)
    assert not box.has_step


def test_a_slot_that_is_not_there_does_not_reach_the_draft() -> None:
    """It would write its tables over something else."""
    box = mailbox()
    assert box.post(Step(releases=[Release(Stamp(SHAPE.slots, 1, 0))]))
    assert box.receive() is None
    assert box.dropped == 1


# ---- state ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(words, words, words)
def test_any_words_are_a_state(state: int, max_length: int, asleep: int) -> None:
    box = mailbox()
    box._words[STATE], box._words[MAX_LENGTH], box._words[ASLEEP] = state, max_length, asleep
    assert box.state is (DraftState(state) if state in (0, 1, 2) else DraftState.FAILED)
    assert 0 <= box.max_length < 2**31
    assert box.asleep is (asleep != 0)


@settings(deadline=None)
@given(words | st.integers(-2, 10_003))
def test_any_word_is_a_c_or_none(word: int) -> None:
    box = mailbox()
    box._words[SAMPLING_C] = word
    assert box.sampling_c == ((word - 1) / 10_000 if 1 <= word <= 10_001 else None)
    assert box.read(1) is not None, "nothing else depends on it"
