"""The q of a table: read back one verify pass after its tokens, exactly as it was drawn from, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saguaro.messages import Proposals, Stamp, Table
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape

SHAPE = MailboxShape(slots=2, branches=4, num_speculative_tokens=3, ring_bytes=64, support=5)
STAMP = Stamp(1, 5, 6)


@pytest.fixture
def box() -> Mailbox:
    return mailbox()


def mailbox() -> Mailbox:
    return Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)


def q_of(seed: int, branches: int, width: int = SHAPE.support) -> Proposals:
    """The q [branches, width] of one depth: other numbers for each seed."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 2**31, (branches, width)).astype(np.int32)
    weights = random.random((branches, width)).astype(np.float32)
    return Proposals(tokens, weights / weights.sum(axis=1, keepdims=True))


def publish(box: Mailbox, stamp: Stamp, depths: Sequence[Proposals | None], branches: int, begin: int = 0) -> int:
    """Publish a table of so many branches from depth `begin` on, with this q at each depth; its version."""
    accepted, bonus = [0] * branches, list(range(branches))
    for depth in range(begin, len(depths) + 1):
        drafts = [[10 * d + i for i in range(branches)] for d in range(depth)]
        box.publish(Table(stamp, accepted, bonus, drafts, newest=depths[depth - 1] if depth else None))
    table = box.read(stamp.slot)
    assert table is not None
    return table.version


def agrees(found: Proposals | None, depths: Sequence[Proposals], branch: int, width: int = SHAPE.support) -> bool:
    """Whether this is the q of a branch, bit for bit, with nothing beyond its width."""
    if found is None or found.probabilities.shape != (len(depths), SHAPE.support):
        return False
    tokens = np.stack([q.tokens[branch] for q in depths])
    probabilities = np.stack([q.probabilities[branch] for q in depths])
    return (
        found.probabilities.dtype == np.float32
        and np.array_equal(found.tokens[:, :width], tokens)
        and np.array_equal(found.probabilities[:, :width], probabilities)
        and not found.probabilities[:, width:].any()
    )


def test_each_branch_has_its_own_q_at_each_depth(box: Mailbox) -> None:
    depths = [q_of(seed, 4) for seed in range(3)]
    version = publish(box, STAMP, depths, 4)
    for branch in range(4):
        for count in (1, 2, 3):
            assert agrees(box.proposals(STAMP, version, branch, count), depths[:count], branch)
    assert not agrees(box.proposals(STAMP, version, 1, 3), depths, 0)


def test_a_q_is_a_copy_that_nobody_writes_to(box: Mailbox) -> None:
    depths = [q_of(1, 4)]
    found = box.proposals(STAMP, publish(box, STAMP, depths, 4), 2, 1)
    publish(box, Stamp(1, 5, 8), [q_of(2, 4)], 4)
    assert agrees(found, depths, 2)


def test_the_q_of_a_round_outlives_the_table_of_the_next_but_not_of_the_one_after(box: Mailbox) -> None:
    first, second, third = ([q_of(seed, 4)] for seed in (1, 2, 3))
    old = publish(box, STAMP, first, 4)
    new = publish(box, STAMP.next(), second, 4)
    assert agrees(box.proposals(STAMP, old, 0, 1), first, 0)
    assert agrees(box.proposals(STAMP.next(), new, 0, 1), second, 0)
    newest = publish(box, STAMP.next().next(), third, 4)
    assert box.proposals(STAMP, old, 0, 1) is None
    assert agrees(box.proposals(STAMP.next(), new, 0, 1), second, 0)
    assert agrees(box.proposals(STAMP.next().next(), newest, 0, 1), third, 0)


def test_the_keys_of_the_round_after_the_next_are_enough_to_end_it(box: Mailbox) -> None:
    version = publish(box, STAMP, [q_of(1, 4)], 4)
    newer = publish(box, STAMP.next().next(), [], 4)
    assert box.proposals(STAMP, version, 0, 1) is None
    assert box.proposals(STAMP.next().next(), newer, 0, 1) is None


@pytest.mark.parametrize(
    "other", [Stamp(0, 5, 6), Stamp(1, 4, 6), Stamp(1, 6, 6), Stamp(1, 5, 4), Stamp(1, 5, 8), Stamp(1, 5, 7)]
)
def test_the_q_of_another_stamp_is_not_there(box: Mailbox, other: Stamp) -> None:
    version = publish(box, STAMP, [q_of(1, 4)], 4)
    assert box.proposals(STAMP, version, 0, 1) is not None
    assert box.proposals(other, version, 0, 1) is None


def test_a_slot_that_is_used_again_gives_no_q_of_the_request_before(box: Mailbox) -> None:
    before = publish(box, Stamp(1, 5, 0), [q_of(1, 4)], 4)
    after = publish(box, Stamp(1, 6, 0), [], 4)
    for version in (before, after):
        assert box.proposals(Stamp(1, 5, 0), version, 0, 1) is None
        assert box.proposals(Stamp(1, 6, 0), version, 0, 1) is None


def test_slots_do_not_share_their_q(box: Mailbox) -> None:
    one, other = [q_of(1, 4)], [q_of(2, 4)]
    first = publish(box, Stamp(0, 5, 6), one, 4)
    second = publish(box, STAMP, other, 4)
    assert agrees(box.proposals(Stamp(0, 5, 6), first, 3, 1), one, 3)
    assert agrees(box.proposals(STAMP, second, 3, 1), other, 3)


def test_certain_drafts_have_no_q_even_where_there_was_one(box: Mailbox) -> None:
    assert box.proposals(STAMP, publish(box, STAMP, [None, None], 4), 0, 2) is None
    later = Stamp(1, 5, 8)
    version = publish(box, later, [q_of(1, 4)] * 2, 4)
    assert box.proposals(later, version, 0, 2) is not None
    certain = Stamp(1, 5, 10)
    assert box.proposals(certain, publish(box, certain, [None, None], 4), 0, 2) is None
    assert box.proposals(later, version, 0, 2) is None


def test_a_table_of_the_same_stamp_with_other_branches_takes_the_place_of_the_first(box: Mailbox) -> None:
    """Who read the first one must never be given the q of the second, though the stamp is the same."""
    first, second = [q_of(seed, 4) for seed in (1, 2, 3)], [q_of(seed, 1) for seed in (4, 5)]
    old = publish(box, STAMP, first, 4)
    new = publish(box, STAMP, [], 1)
    assert old != new
    assert box.proposals(STAMP, old, 0, 1) is None
    assert box.proposals(STAMP, new, 0, 1) is None, "not written yet"
    assert publish(box, STAMP, second, 1, begin=1) == new
    assert agrees(box.proposals(STAMP, new, 0, 2), second, 0)
    assert box.proposals(STAMP, old, 0, 2) is None


def test_a_version_stays_the_same_while_the_table_grows_and_is_of_its_slot(box: Mailbox) -> None:
    versions = {publish(box, STAMP, [q_of(1, 4)] * depth, 4, begin=depth) for depth in range(4)}
    assert len(versions) == 1
    publish(box, Stamp(0, 1, 0), [], 4)
    assert {publish(box, STAMP, [q_of(1, 4)] * 3, 4, begin=3)} == versions


def test_narrow_rows_after_wide_ones_have_nothing_of_them(box: Mailbox) -> None:
    publish(box, STAMP, [q_of(1, 4)] * 3, 4)
    narrow = [q_of(seed, 2, width=3) for seed in (2, 3, 4)]
    version = publish(box, Stamp(1, 5, 8), narrow, 2)
    for branch in range(2):
        found = box.proposals(Stamp(1, 5, 8), version, branch, 3)
        assert agrees(found, narrow, branch, width=3)
        assert found is not None
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-6)


def test_a_q_that_is_replaced_while_it_is_read_is_not_there() -> None:
    memory = memoryview(bytearray(SHAPE.total_bytes))
    box, writer = Mailbox(memory, SHAPE), Mailbox(memory, SHAPE)
    version = publish(writer, STAMP, [q_of(1, 4)], 4)
    whole, newer = box._q_probabilities, list[int]()

    class Replaced:
        """The writer comes in between the two halves of the copy."""

        def __getitem__(self, place: Any) -> np.ndarray:
            newer.append(publish(writer, Stamp(1, 5, 8), [q_of(2, 4)], 4))
            return whole[place]

    box._q_probabilities = Replaced()  # type: ignore[assignment]
    assert box.proposals(STAMP, version, 0, 1) is None
    box._q_probabilities = whole
    assert agrees(box.proposals(Stamp(1, 5, 8), newer[0], 0, 1), [q_of(2, 4)], 0)


def test_a_q_does_not_run_into_the_ring_or_the_tables(box: Mailbox) -> None:
    before = bytes(box._cells), bytes(box._ring)
    for slot in range(SHAPE.slots):
        for round_ in (0, 1):
            box._publish_q(Stamp(slot, 1, round_), 2, SHAPE.num_speculative_tokens - 1, q_of(1, SHAPE.branches))
    assert (bytes(box._cells), bytes(box._ring)) == before
    assert SHAPE.total_bytes == SHAPE.tables_bytes + 8 * 2 * 2 * SHAPE.q_words + SHAPE.ring_bytes


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(1, SHAPE.branches),
            st.integers(1, SHAPE.support),
            st.integers(0, SHAPE.num_speculative_tokens),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_of_any_tables_the_newest_of_the_last_two_rounds_are_there_and_no_others(
    tables: list[tuple[int, int, int, int, bool]],
) -> None:
    """Each as (0: a round begun anew, 1: the next one; branches; width; depth; whether its drafts are certain)."""
    box = mailbox()
    stamp = Stamp(0, 3, 0)
    kept: list[tuple[Stamp, int, list[Proposals], int, int]] = []
    for number, (ahead, branches, width, depth, certain) in enumerate(tables):
        stamp = Stamp(0, 3, stamp.round + ahead)
        depths = [q_of(8 * number + d, branches, width) for d in range(depth)]
        version = publish(box, stamp, [None] * depth if certain else list(depths), branches)
        kept = [entry for entry in kept if entry[0] != stamp]
        kept.append((stamp, version, [] if certain else depths, branches, width))
    for of, version, depths, branches, width in kept:
        for branch in range(branches):
            found = box.proposals(of, version, branch, len(depths))
            if depths and of.round >= stamp.round - 1:
                assert agrees(found, depths, branch, width)
            else:
                assert found is None
