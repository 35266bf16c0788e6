"""`MailboxDraft` with a draft side that moves when the test says so: hits, who comes and goes, what fails."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.device_sides import CPU, GREEDY, SAMPLED, SHAPE, HostChannel, SmallTarget, outcomes_of
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.messages import Release, Stamp
from vllm_saguaro.placement import device_mailbox
from vllm_saguaro.placement.channel import LendingChannel
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.layout import MailboxShape

LOG = logging.getLogger("test")
PROMPT = [3, 1, 4, 1, 5, 9]


class Sides:
    """Both sides."""

    def __init__(self, shape: MailboxShape = SHAPE, max_length: int = 64) -> None:
        self.channel = HostChannel(shape, max_length)
        lending: LendingChannel = self.channel
        self.draft = MailboxDraft(lending, shape, CPU, TWINS, LOG)
        self.draft.wait_until_ready()
        self.target = SmallTarget(self.draft)

    def round(self) -> None:
        """The draft side has all the time it needs, then the target's step."""
        self.channel.work()
        self.target.step()


@pytest.fixture
def sides() -> Iterator[Sides]:
    both = Sides()
    yield both
    both.draft.close()


def test_outcomes_that_were_predicted_get_the_drafts_of_their_branch(sides: Sides) -> None:
    sides.target.admit(2, PROMPT)
    sides.target.admit(0, PROMPT[:3])
    for _ in range(10):
        sides.round()
    assert sides.target.hits > 12
    assert len(sides.target.texts[2]) > len(PROMPT) + 20


def test_the_draft_side_hears_what_happened(sides: Sides) -> None:
    sides.target.admit(1, PROMPT)
    sides.channel.work()
    drafts = sides.target.step()
    text, given = list(sides.target.texts[1]), drafts.tokens[0, : int(drafts.ready[0])].tolist()
    (step,) = sides.channel.take_in()
    (first,) = step.outcomes
    assert (first.stamp, first.accepted, first.bonus, first.length) == (Stamp(1, 1, 0), 0, text[-1], len(text))
    assert (list(first.speculation), first.verified) == (given, 0)
    sides.channel.work()
    sides.target.step()
    (step,) = sides.channel.take_in()
    (second,) = step.outcomes
    assert (second.stamp, second.verified) == (Stamp(1, 1, 1), len(given))
    assert second.length == len(sides.target.texts[1])
    assert second.accepted == second.length - len(text) - 1


def test_the_draft_side_hears_how_many_drafts_were_in_the_pass(sides: Sides) -> None:
    """Fewer than were given where the scheduler cut them; filler is no draft."""
    sides.target.admit(1, PROMPT)
    for _ in range(6):
        sides.round()
    given = sides.target.under_verification[1]
    assert len(given) > 1
    length = len(sides.target.texts[1])
    for verified, expected in ((1, 1), (SHAPE.num_speculative_tokens, 0)):
        sides.target.draft.exchange(outcomes_of([(1, 0, 7, length + 1)], verified=verified))
        *_, step = sides.channel.take_in()
        assert [outcome.verified for outcome in step.outcomes] == [expected]


def test_a_table_that_is_not_there_yet_is_a_miss_and_one_that_grows_serves_what_it_has(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    assert sides.target.step().ready.tolist() == [0]  # not even the prompt was read
    sides.channel.work()
    seen = set[int]()
    for _ in range(12):
        sides.channel.take_in()
        for _ in range(4):  # a forward more or less than a whole round
            sides.channel.loop.advance()
            if len(seen) % 2 and sides.channel.loop.advance():
                break
        seen.add(int(sides.target.step().ready[0]))
    assert len(seen) > 1


def test_a_row_without_a_token_changes_nothing(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    sides.target.admit(3, PROMPT[:2])
    sides.channel.work()
    drafts = sides.target.step(reading=[3])
    assert drafts.ready.tolist()[1] == 0
    (step,) = sides.channel.take_in()
    assert [outcome.stamp for outcome in step.outcomes] == [Stamp(0, 1, 0)]
    sides.round()
    stamps = [outcome.stamp for step in sides.channel.take_in() for outcome in step.outcomes]
    assert stamps == [Stamp(0, 1, 1), Stamp(3, 1, 0)]


def test_a_request_that_is_not_in_a_step_goes_on_where_it_was(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    sides.target.admit(1, PROMPT[:4])
    sides.round()
    for _ in range(3):
        sides.channel.work()
        sides.target.step([0])
    before = sides.target.hits
    for _ in range(4):
        sides.channel.work()
        sides.target.step([1])
    assert sides.target.hits > before


def test_a_slot_that_is_used_again_has_nothing_of_the_request_before(sides: Sides) -> None:
    sides.target.admit(0, PROMPT, "a")
    for _ in range(3):
        sides.round()
    sides.channel.work()
    sides.target.release(0, "a")
    sides.target.admit(0, [9, 9], "b")
    assert sides.target.step().ready.tolist() == [0], "the table there is another request's"
    for _ in range(4):
        sides.round()
    assert sides.target.hits >= 5
    stamps = [outcome.stamp for step in sides.channel.steps for outcome in step.outcomes]
    assert Stamp(0, 2, 0) in stamps


def test_an_outcome_of_a_request_that_has_left_does_not_hurt_the_next(sides: Sides) -> None:
    """Its record may be read after the release, and after the admission of the next."""
    sides.target.admit(0, PROMPT, "a")
    sides.channel.work()
    sides.target.step()
    sides.target.release(0, "a")
    sides.target.admit(0, [8, 7], "b")
    for _ in range(5):
        sides.round()
    assert sides.target.hits >= 3


def test_a_request_that_was_never_admitted_is_never_matched(sides: Sides) -> None:
    sides.target.admit(0, PROMPT, "a")
    sides.round()
    sides.channel.work()
    sides.target.release(0, "a")
    table = sides.channel.read(0)
    assert table is not None
    assert table.drafts
    found = sides.draft.exchange(outcomes_of([(0, table.accepted[0], table.bonus[0], 9)]))
    assert found.ready.tolist() == [0]


def test_the_end_of_another_request_is_not_that_of_the_one_in_the_slot(sides: Sides) -> None:
    sides.target.admit(0, PROMPT, "b")
    sides.draft.release(0, "a")
    for _ in range(3):
        sides.round()
    assert sides.target.hits


def test_the_draft_side_is_told_of_everybody_who_leaves() -> None:
    sides = Sides()
    sides.target.admit(0, PROMPT)
    sides.target.admit(1, PROMPT)
    sides.channel.work()
    assert len(sides.channel.loop) == 2
    sides.channel.full = True
    sides.target.release(0)
    sides.channel.work()
    assert len(sides.channel.loop) == 2, "it could not be told"
    sides.channel.full = False
    sides.target.step()
    sides.channel.work()
    assert len(sides.channel.loop) == 1
    sides.target.admit(1, [2, 2], "other")
    assert [r for step in sides.channel.take_in() for r in step.releases] == [Release(Stamp(1, 1, 0))]
    sides.draft.close()


@pytest.mark.parametrize("length", [60, 61, 200])
def test_a_text_that_the_draft_cannot_hold_goes_without(sides: Sides, length: int) -> None:
    sides.target.admit(0, [7] * length)
    for _ in range(2):
        sides.round()
    assert (sides.target.hits > 0) == (length + SHAPE.num_speculative_tokens + 1 <= 64)
    assert sides.channel.steps or length > 60


def test_one_that_finds_the_ring_full_goes_without(sides: Sides) -> None:
    sides.channel.full = True
    sides.target.admit(0, PROMPT)
    sides.target.admit(1, PROMPT)
    sides.channel.full = False
    sides.target.admit(1, PROMPT[1:], "again")
    for _ in range(4):
        sides.channel.work()
        assert sides.target.step([0]).ready.tolist() == [0]
        sides.channel.work()
        sides.target.step([1])
    assert sides.target.hits
    assert {outcome.stamp.slot for step in sides.channel.steps for outcome in step.outcomes} == {1}


# ---- lives of the draft side ----------------------------------------------------------------------------------------


def test_without_a_draft_side_requests_go_on_and_those_that_come_later_have_drafts(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    for _ in range(3):
        sides.round()
    sides.channel.end()
    for _ in range(2):
        assert sides.target.step().ready.tolist() == [0]
    sides.channel.begin()
    for _ in range(3):
        sides.round()
    assert not sides.target.under_verification[0], "the host does not know its text"
    sides.target.admit(1, PROMPT[1:])
    for _ in range(4):
        sides.channel.work()
        sides.target.step([1])
    assert sides.target.under_verification[1] or sides.target.hits > 2
    assert all(outcome.stamp.slot == 1 for step in sides.channel.steps[-4:] for outcome in step.outcomes)


def test_requests_without_an_outcome_yet_are_told_to_the_next_life(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    sides.target.admit(1, PROMPT[1:])
    sides.channel.work()
    sides.target.step([0])
    sides.channel.end()
    sides.target.admit(2, PROMPT[2:])
    sides.target.admit(3, PROMPT[3:])
    sides.target.release(3)
    sides.channel.begin()
    sides.draft.release(3, "nobody")  # any call looks
    (first, second) = sides.channel.take_in()
    assert [(a.stamp.slot, list(a.token_ids)) for step in (first, second) for a in step.admits] == [
        (1, PROMPT[1:]),
        (2, PROMPT[2:]),
    ]
    before = sides.target.hits
    for _ in range(4):
        sides.channel.work()
        sides.target.step([1, 2])
    assert sides.target.hits > before + 3


def test_what_the_life_before_wrote_is_never_read(sides: Sides) -> None:
    sides.target.admit(0, PROMPT)
    sides.channel.work()
    old = sides.channel.memory
    sides.channel.end()
    sides.channel.begin()
    sides.channel.memory[SHAPE.tables_bytes - 1] = 0
    assert sides.target.step().ready.tolist() == [0]
    assert bytes(old[: SHAPE.tables_bytes]) != bytes(sides.channel.memory[: SHAPE.tables_bytes])


def test_a_life_that_ends_while_its_memory_is_asked_for_is_looked_at_again(sides: Sides) -> None:
    sides.channel.end()
    sides.target.admit(0, PROMPT)
    sides.channel.begin()
    lend, sides.channel.lend = sides.channel.lend, lambda: None  # type: ignore[method-assign]
    assert sides.target.step().ready.tolist() == [0]
    sides.channel.lend = lend  # type: ignore[method-assign]
    sides.target.admit(1, PROMPT)
    for _ in range(3):
        sides.round()
    assert sides.target.hits


def refuse_memory(patch: pytest.MonkeyPatch) -> list[int]:
    """How many words the device was to reach, each time."""
    asked = list[int]()

    def refuse(memory: memoryview, device: torch.device) -> None:
        asked.append(len(memory) // 8)
        raise RuntimeError("CUDA cannot register the bytes of the draft's mailbox: error 2")

    patch.setattr(device_mailbox, "RegisteredMemory", refuse)
    return asked


def test_a_life_whose_memory_is_out_of_reach_is_none_and_the_one_after_it_is_again(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sides.target.admit(0, PROMPT)
    for _ in range(3):
        sides.round()
    sides.channel.end()
    sides.channel.begin()
    with monkeypatch.context() as patch:
        asked = refuse_memory(patch)
        sides.target.admit(1, PROMPT[1:])
        for _ in range(3):
            sides.round()
        sides.target.release(1)
    assert len(asked) == 1, "not tried again and again"
    assert sides.channel.steps[-1].outcomes, "of the life before"
    assert not any(sides.target.under_verification.values())
    assert len([record for record in caplog.records if "out of the device's reach" in record.getMessage()]) == 1
    sides.channel.end()
    sides.channel.begin()
    before = sides.target.hits
    sides.target.admit(2, PROMPT[2:])
    for _ in range(4):
        sides.channel.work()
        sides.target.step([2])
    assert sides.target.hits > before


def test_a_first_life_whose_memory_is_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start of the engine: what never worked is a wrong setting."""
    refuse_memory(monkeypatch)
    lending: LendingChannel = HostChannel()
    draft = MailboxDraft(lending, SHAPE, CPU, TWINS, LOG)
    with pytest.raises(RuntimeError, match="cannot register"):
        draft.wait_until_ready()


def test_memory_is_let_go_of_with_its_life() -> None:
    sides = Sides()
    sides.target.admit(0, PROMPT)
    sides.round()
    old = sides.channel.memory
    with pytest.raises(BufferError):
        old.append(0)
    sides.channel.end()
    sides.channel.begin()
    sides.round()
    sides.round()
    sides.draft.close()
    old.append(0)  # raises BufferError while anyone holds a view
    sides.channel.target_end.close()
    sides.channel.draft_end.close()
    sides.channel.memory.append(0)


def test_kernels_are_compiled_before_a_request_is_there() -> None:
    """On a GPU the first call of each takes a moment, which no request should wait for."""
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return getattr(TWINS, name)(*arguments)

        return call

    names = ("copy_rows", "copy_branches", "take_drafts", "seal_record")
    operations = dataclasses.replace(TWINS, **{name: noted(name) for name in names})
    channel = HostChannel()
    lending: LendingChannel = channel
    draft = MailboxDraft(lending, SHAPE, CPU, operations, LOG)
    draft.wait_until_ready()
    assert set(called) == set(names)
    assert not channel.take_in(), "nothing is told of it"
    draft.close()


def test_a_shape_without_records_is_refused() -> None:
    with pytest.raises(ValueError, match="device_steps"):
        MailboxDraft(HostChannel(), MailboxShape(1, 1, 1, 8, 1), CPU, TWINS, LOG)


# ---- C --------------------------------------------------------------------------------------------------------------


def test_c_is_that_of_the_draft_side(sides: Sides) -> None:
    assert sides.draft.sampling_c is None
    sides.channel.sampling_c = 0.5
    assert sides.draft.sampling_c == 0.5


# ---- q --------------------------------------------------------------------------------------------------------------


def test_q_of_sampled_drafts_is_what_they_were_drawn_from(sides: Sides) -> None:
    sides.draft.admit(1, "r", PROMPT, SAMPLED)
    sides.channel.work()
    table = sides.channel.read(1)
    assert table is not None
    for branch in range(len(table.bonus)):
        outcomes = outcomes_of([(1, table.accepted[branch], table.bonus[branch], 7)], 0.8)
        q = sides.channel.proposals(table.stamp, table.version, branch, 3)
        assert q is not None
        logits = torch.full((4, 3, 40), 5.0)
        drafts = sides.draft.exchange(outcomes)
        assert drafts.ready.tolist() == [3]
        drafts.tokens.fill_(-1)  # the runner may write into them
        sides.draft.logits_into(outcomes, drafts, logits)
        found = (logits[1] / 0.8).softmax(-1)
        expected = torch.zeros(3, 40).scatter_(1, torch.from_numpy(q.tokens).long(), torch.from_numpy(q.probabilities))
        torch.testing.assert_close(found, expected)
        assert torch.equal(logits[[0, 2, 3]], torch.full((3, 3, 40), 5.0)), "rows of others are theirs"
        sides.draft._step.state[1, 1] = 0  # as if this outcome had not been


def test_there_may_be_fewer_slots_than_drafts() -> None:
    sides = Sides(dataclasses.replace(SHAPE, slots=2))
    sides.draft.admit(0, "r", PROMPT, SAMPLED)
    sides.channel.work()
    table = sides.channel.read(0)
    assert table is not None
    outcomes = outcomes_of([(0, table.accepted[0], table.bonus[0], 7)], 0.8)
    logits = torch.zeros(2, 3, 40)
    sides.draft.logits_into(outcomes, sides.draft.exchange(outcomes), logits)
    assert (logits[0].isfinite().sum(-1) > 1).all(), "all three were drawn, and their q is there"
    sides.draft.close()


def test_certain_drafts_are_certain(sides: Sides) -> None:
    sides.target.admit(1, PROMPT)
    sides.draft.admit(0, "s", PROMPT, SAMPLED)
    sides.channel.work()
    table = sides.channel.read(1)
    assert table is not None
    outcomes = outcomes_of([(1, table.accepted[0], table.bonus[0], 7), (0, 0, 39, 7)], 0.8)
    drafts = sides.draft.exchange(outcomes)
    logits = torch.full((4, 3, 40), 5.0)
    sides.draft.logits_into(outcomes, drafts, logits)
    assert logits[1].argmax(-1).tolist() == drafts.tokens[0].tolist()
    assert logits[0].argmax(-1).tolist() == drafts.tokens[1].tolist() == [39] * 3
    for slot in (0, 1):
        assert logits[slot].isfinite().sum(-1).tolist() == [1, 1, 1]
        assert logits[slot].max(-1).values.tolist() == [0, 0, 0]


def test_where_drafts_are_never_sampled_no_q_is_mapped_and_rows_are_certain() -> None:
    channel = HostChannel()
    lending: LendingChannel = channel
    draft = MailboxDraft(lending, SHAPE, CPU, TWINS, LOG, with_q=False)
    draft.wait_until_ready()
    target = SmallTarget(draft)
    target.admit(1, PROMPT)
    for _ in range(6):
        channel.work()
        target.step()
    assert target.hits
    outcomes = outcomes_of([(1, 0, 5, 7)], 0.8)
    logits = torch.zeros(4, 3, 40)
    drafts = draft.exchange(outcomes)
    draft.logits_into(outcomes, drafts, logits)
    assert logits[1].isfinite().sum(-1).tolist() == [1, 1, 1]
    draft.close()


def test_q_is_written_only_where_somebody_asks(sides: Sides) -> None:
    sides.draft.admit(1, "r", PROMPT, SAMPLED)
    outcomes = outcomes_of([(1, 0, 5, 7)])
    drafts = sides.draft.exchange(outcomes)
    sides.draft.logits_into(outcomes, drafts, None)
    logits = torch.full((4, 3, 40), 5.0)
    sides.draft.logits_into(outcomes, drafts, logits)
    assert not (logits[1] == 5).any()
    assert (logits[[0, 2, 3]] == 5).all()


def test_a_request_told_as_greedy_has_certain_rows(sides: Sides) -> None:
    """The verifier may read them all the same: one with a grammar is told so, whatever its temperature."""
    sides.draft.admit(1, "r", PROMPT, GREEDY)
    outcomes = outcomes_of([(1, 0, 5, 7)])
    drafts = sides.draft.exchange(outcomes)
    logits = torch.full((4, 3, 40), 5.0)
    sides.draft.logits_into(outcomes, drafts, logits)
    assert logits[1].argmax(-1).tolist() == drafts.tokens[0].tolist()
    assert logits[1].isfinite().sum(-1).tolist() == [1, 1, 1]


def test_without_a_draft_side_rows_are_certain(sides: Sides) -> None:
    sides.draft.admit(2, "r", PROMPT, SAMPLED)
    sides.channel.end()
    outcomes = outcomes_of([(2, 0, 5, 7)], 0.8)
    logits = torch.zeros(4, 3, 40)
    sides.draft.logits_into(outcomes, sides.draft.exchange(outcomes), logits)
    assert logits[2].softmax(-1)[:, 5].tolist() == [1, 1, 1]


# ---- anything may happen --------------------------------------------------------------------------------------------

EVENTS = st.one_of(
    st.tuples(st.just("step"), st.sets(st.integers(0, 3), min_size=1)),
    st.tuples(st.just("step"), st.just({0, 1, 2, 3})),
    st.tuples(st.just("work"), st.integers(0, 9)),
    st.tuples(st.just("work"), st.integers(0, 9)),
    st.tuples(st.just("admit"), st.integers(0, 3)),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.sampled_from(["end", "begin", "full", "room"]), st.just(0)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_drafts_are_those_of_the_text_and_afterwards_hits_come_back(
    events: list[tuple[str, int | set[int]]],
) -> None:
    """`SmallTarget` looks at every draft. Steps may come faster than the draft side reads: records are lost then."""
    sides = Sides(max_length=600)
    channel, target = sides.channel, sides.target
    for number, (what, which) in enumerate(events):
        if what == "step" and isinstance(which, set):
            running = [slot for slot in which if slot in target.texts]
            if running:
                target.step(running)
        elif what == "work" and isinstance(which, int):
            channel.work(which)
        elif what == "admit" and isinstance(which, int):
            if which in target.texts:
                target.release(which)
            target.admit(which, [number % 40, which, 1])
        elif what == "release" and which in target.texts and isinstance(which, int):
            target.release(which)
        elif what == "end":
            channel.end()
        elif what == "begin" and not channel.alive:
            channel.begin()
        elif what in ("full", "room"):
            channel.full = what == "full"
    channel.full = False
    if not channel.alive:
        channel.begin()
    for slot in list(target.texts):
        target.release(slot)
    for slot in range(4):
        target.admit(slot, [slot, 1, 2])
    before = target.hits
    for _ in range(4):
        sides.round()
    assert target.hits > before + 6
    assert len(channel.loop) == 4
    sides.draft.close()
