"""The device engine against an oracle: whatever came before, a branch says what the draft model says of its text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.drafting.device_driver import ANOTHER, Outcome, World
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.messages import Sampling

PROMPT = [(7 * i + 3) % 40 for i in range(11)]
SAMPLED = Sampling(temperature=0.8)


def hit_of(world: World, slot: int, branch: int = 0) -> Outcome:
    """An outcome that the table of the slot has."""
    table = world.table(slot)
    return table[branch % len(table)][0]


def test_a_prompt_is_read_and_the_first_outcome_is_a_miss() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    assert world.step({0: (0, 5)}).hits == [False]
    assert len(world.table(0)) == 4


@pytest.mark.parametrize("branch", range(4))
def test_a_hit_gives_the_drafts_of_its_branch_and_the_next_table_goes_on_from_them(branch: int) -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    for _ in range(8):
        assert world.step({0: hit_of(world, 0, branch)}).hits == [True]
    assert world.hits == 8


def test_after_hits_and_misses_in_turn_every_table_is_right() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    for i in range(6):
        world.step({0: hit_of(world, 0, i)})
        world.step({0: (i % 3, 17)} if i % 3 <= len(world.requests[0].drafts) else {0: (0, 17)})
    assert world.hits >= 6


def test_a_table_waits_for_a_request_that_sits_a_step_out() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.admit(1, PROMPT[:4])
    world.step({0: (0, 5), 1: (0, 6)})
    kept = hit_of(world, 1)
    world.step({0: hit_of(world, 0)})
    world.step({0: hit_of(world, 0)})
    assert world.step({1: kept}).hits == [True]


def test_a_row_without_a_token_changes_nothing() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.admit(1, PROMPT[:4])
    world.step({0: (0, 5), 1: None})
    table = world.table(0)
    world.step({1: (0, 3), 0: None})
    assert world.table(0) == table


def test_a_slot_that_is_used_again_has_nothing_of_the_request_before() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    old = hit_of(world, 0)
    world.release(0)
    world.admit(0, PROMPT[:7])
    assert world.step({0: (0, old[1])}).hits == [False]
    world.admit(0, PROMPT[:3])  # without a release: the runner's next request replaces it
    assert world.step({0: (0, 4)}).hits == [False]


def test_a_release_of_the_request_before_does_not_touch_the_one_that_is_there() -> None:
    world = World(FakeDeviceModel())
    old = world.admit(0, PROMPT)
    world.admit(0, PROMPT[:7])
    world.draft.release(0, old.name)
    world.step({0: (0, 4)})
    assert world.step({0: hit_of(world, 0)}).hits == [True]


def test_a_long_prompt_is_read_in_pieces_while_tokens_come() -> None:
    model = FakeDeviceModel(max_tokens=6)
    world = World(model)
    world.admit(1, PROMPT[:3])
    world.step({1: (0, 9)})
    world.admit(0, [(5 * i + 1) % 40 for i in range(20)])
    steps = 0
    while not world.reads(0):
        assert world.step({0: (0, 30 + steps), 1: hit_of(world, 1)}).hits == [False, True]
        steps += 1
        assert steps < 8
    assert steps > 2
    world.step({0: (0, 39), 1: (0, 1)})
    assert world.step({0: hit_of(world, 0)}).hits == [True]


def test_steps_without_a_token_may_pass_while_a_prompt_is_read() -> None:
    world = World(FakeDeviceModel(max_tokens=6))
    world.admit(0, [(5 * i + 1) % 40 for i in range(20)])
    while not world.reads(0):
        world.step({0: None})
    world.step({0: (0, 39)})
    assert world.step({0: hit_of(world, 0)}).hits == [True]


def test_a_request_that_has_more_tokens_than_are_remembered_is_given_up() -> None:
    world = World(FakeDeviceModel(max_length=400, max_tokens=16, num_blocks=300), slots=2)
    world.engine.state.tail.resize_(3, 4)
    world.admit(0, [1] * 160)
    for i in range(8):
        world.step({0: (0, i)})
    for _ in range(12):
        world.step({0: (0, 1)})
    assert not world.reads(0)


def test_branches_stop_where_the_draft_has_no_more_room() -> None:
    world = World(FakeDeviceModel(max_length=24), drafts=3)
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    while world.table(0):
        world.step({0: hit_of(world, 0, 1)})
    assert 24 - 6 <= len(world.requests[0].text) + len(world.requests[0].drafts) <= 24
    for token in range(10):  # the target goes on
        drafts = world.requests[0].drafts
        world.step({0: (len(drafts), token)})
    assert world.table(0) == []


def test_a_text_that_is_too_long_or_has_unknown_tokens_is_not_drafted_for() -> None:
    world = World(FakeDeviceModel(max_length=24))
    for text in ([1] * 25, [1, ANOTHER]):
        world.admit(0, text)
        assert not world.engine.drafts_for(0)
        assert world.step({0: (0, 5)}).hits == [False]
        assert world.table(0) == []


def test_a_bonus_token_that_the_draft_does_not_know_ends_its_drafting_alone() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.admit(1, PROMPT[:5])
    world.step({0: (0, 5), 1: (0, 6)})
    world.step({0: (0, ANOTHER), 1: hit_of(world, 1)})
    assert not world.reads(0)
    assert world.step({0: (0, 5), 1: hit_of(world, 1)}).hits == [False, True]
    assert not world.engine.drafts_for(0), "its blocks are for others"


def test_a_length_that_does_not_agree_ends_the_drafting_of_that_request_alone() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.admit(1, PROMPT[:5])
    world.step({0: (0, 5), 1: (0, 6)})
    world.requests[0].text.append(1)
    world.step({0: (0, 7), 1: hit_of(world, 1)})
    assert not world.reads(0)
    assert world.reads(1)


def test_where_blocks_run_out_a_request_goes_without_and_the_others_go_on() -> None:
    model = FakeDeviceModel(num_blocks=24, max_length=64)
    world = World(model, slots=3, branches=3)
    for slot in range(3):
        world.admit(slot, PROMPT[: 4 + slot])
    world.step({slot: (0, slot) for slot in range(3)})
    for _ in range(12):
        drafted = [slot for slot in range(3) if world.table(slot)]
        world.step({slot: hit_of(world, slot) if slot in drafted else (0, 8) for slot in range(3)})
    assert any(not world.engine.drafts_for(slot) for slot in range(3))
    assert world.hits


def test_more_branches_than_there_are_outcomes_leave_the_rest_unused() -> None:
    world = World(FakeDeviceModel(vocab_size=6), branches=32)
    world.admit(0, [1, 2, 3])
    world.step({0: (0, 5)})
    assert len(world.table(0)) == 6  # nothing is under verification: any of 6 tokens
    world.step({0: hit_of(world, 0)})
    assert len(world.table(0)) == 3 * 5 + 6


def test_many_requests_have_fewer_branches_each() -> None:
    world = World(FakeDeviceModel(), slots=4, branches=8, max_rows=8)
    for slot in range(4):
        world.admit(slot, PROMPT[: 3 + slot])
    world.step({slot: (0, slot) for slot in range(4)})
    assert [len(world.table(slot)) for slot in range(4)] == [2, 2, 2, 2]
    world.step({0: hit_of(world, 0)})
    assert len(world.table(0)) == 8
    world.step({3: hit_of(world, 3)})
    assert len(world.table(3)) == 2  # as many as it has blocks for


def test_rows_in_another_order_and_padding_make_no_difference() -> None:
    world = World(FakeDeviceModel(), slots=8)
    for slot in (6, 1, 3, 0, 7):
        world.admit(slot, PROMPT[: 2 + slot])
    world.step({slot: (0, slot) for slot in (3, 6, 0, 7, 1)})
    assert all(world.step({slot: hit_of(world, slot) for slot in (0, 1, 7)}).hits)
    assert all(world.step({slot: hit_of(world, slot) for slot in (7, 6, 3, 1, 0)}).hits)


def test_buffers_of_all_batches_are_there_before_memory_is_measured() -> None:
    world = World(FakeDeviceModel(), slots=8)
    held = world.engine.resident_bytes
    for slot in range(8):
        world.admit(slot, PROMPT[: 2 + slot % 4])
        world.step(dict.fromkeys(range(slot + 1), (0, 5)))
    assert world.engine.resident_bytes == held


def test_drafts_are_drawn_from_what_is_told_of_them_and_told_by_slot() -> None:
    world = World(FakeDeviceModel(), slots=3)
    world.admit(2, PROMPT, SAMPLED)
    world.admit(0, PROMPT[:5])
    world.step({2: (0, 5), 0: (0, 6)})
    logits = torch.randn(3, 3, 40)
    found = {0: hit_of(world, 0), 2: hit_of(world, 2)}
    outcomes = world.outcomes(found)
    drafts = world.draft.exchange(outcomes)
    world.draft.logits_into(outcomes, drafts, logits)
    k, bonus = found[2]
    text = [*PROMPT, 5, *world.requests[2].drafts[:k], bonus]
    for depth, token in enumerate(drafts.tokens[1].tolist()):
        q = (logits[2, depth] / 0.8).softmax(-1)
        torch.testing.assert_close(q, world.q_after(text, SAMPLED), atol=1e-5, rtol=1e-4)
        text.append(token)
    for depth, token in enumerate(drafts.tokens[0].tolist()):
        assert logits[0, depth, token] == 0
        assert (logits[0, depth] > -torch.inf).sum() == 1


@pytest.mark.parametrize(("sampled", "told"), [(-1, 0), (1 << 40, 39)])
def test_a_sampled_id_that_is_none_writes_nowhere_else(sampled: int, told: int) -> None:
    """On a GPU it would be an illegal access, and the end of the target."""
    world = World(FakeDeviceModel(), slots=3)
    world.admit(0, PROMPT, SAMPLED)
    logits = torch.zeros(3, 3, 40)
    outcomes = world.outcomes({0: (0, 5)})
    outcomes.bonus.fill_(sampled)
    engine = world.engine
    engine.take_in(outcomes, engine.bucket(1))
    engine.look_up(engine.bucket(1))
    for _ in range(2):  # the second time it is taken back
        engine.logits_into(outcomes, logits)
        assert (logits > -torch.inf).nonzero().tolist() == [[0, depth, told] for depth in range(3)]


def test_q_of_the_step_before_is_taken_back_and_that_of_others_is_kept() -> None:
    world = World(FakeDeviceModel(vocab_size=100), slots=2)
    world.admit(0, PROMPT, SAMPLED)
    world.admit(1, PROMPT[:5], SAMPLED)
    logits = torch.zeros(2, 3, 100)
    for found in ({0: (0, 5), 1: (0, 6)}, None, {0: (0, 1)}):
        found = found or {slot: hit_of(world, slot) for slot in (0, 1)}
        kept = logits[1].clone()
        outcomes = world.outcomes(found)
        drafts = world.draft.exchange(outcomes)
        world.draft.logits_into(outcomes, drafts, logits)
        for slot, (k, bonus) in found.items():
            world.requests[slot].text += [*world.requests[slot].drafts[:k], bonus]
            row = list(found).index(slot)
            world.requests[slot].drafts = drafts.tokens[row, : int(drafts.ready[row])].tolist()
        held = (logits > -torch.inf).sum(-1)
        assert set(held.flatten().tolist()) <= {1, 64}
        if 1 not in found:
            assert torch.equal(logits[1], kept)
            assert set(held[0].tolist()) == {1}  # a miss


def test_drafts_of_requests_that_sample_greedily_by_choice_are_certain() -> None:
    world = World(FakeDeviceModel(), method="greedy")
    world.admit(0, PROMPT, SAMPLED)
    world.step({0: (0, 5)})
    assert world.step({0: hit_of(world, 0)}).hits == [True]
    assert (world.engine.round.step.log_q[0].exp() == 1).sum() == 3


def test_the_draws_follow_q_and_differ_from_branch_to_branch_and_round_to_round() -> None:
    world = World(FakeDeviceModel(vocab_size=8, max_length=64), branches=8)
    counts, seen = torch.zeros(8), set[tuple[int, ...]]()
    for _ in range(60):
        world.admit(0, [1, 2, 3], Sampling(temperature=1.5))
        world.step({0: (0, 5)})
        table = world.table(0)
        counts += torch.bincount(torch.tensor([d[0] for (k, t), d, _ in table if t == 4]), minlength=8)
        seen.add(tuple(table[0][1]))
    q = world.q_after([1, 2, 3, 5, 4], Sampling(temperature=1.5))
    assert counts.sum() == 60
    assert ((counts - 60 * q) ** 2 / (60 * q)).sum() < 30  # chi2 with 7 degrees of freedom
    assert len(seen) > 5


@pytest.mark.parametrize(("verified", "judged"), [(3, 2), (2, 2), (1, 1), (0, 0)])
def test_drafts_that_were_not_in_the_pass_are_not_learnt_from(verified: int, judged: int) -> None:
    """One was accepted, where there were any: the next was rejected, or left out by the scheduler."""
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    world.step({0: hit_of(world, 0)})
    before = world.engine.round.maps._trials.sum().item()
    world.draft.exchange(world.outcomes({0: (min(1, verified), 5)}, verified=[verified]))
    assert world.engine.round.maps._trials.sum().item() - before == pytest.approx(judged)


def test_deflated_drafts_are_told_as_they_were_drawn() -> None:
    world = World(FakeDeviceModel(), sampling_c=0.0, branches=8)
    world.admit(0, PROMPT, SAMPLED)
    bucket = world.engine.bucket(1)
    outcomes = world.outcomes({0: (0, 5)})
    world.draft.exchange(outcomes)
    log_q = world.engine.state.log_q[0, : bucket.branches, 0]
    assert (log_q == -torch.inf).any(-1).all()
    drafts = world.engine.state.drafts[0, :, 0]
    tokens = world.engine.state.q_tokens[0, :, 0].long()
    drawn = log_q.gather(1, (tokens == drafts.unsqueeze(1)).int().argmax(1, keepdim=True))
    assert (drawn > -torch.inf).all()


def test_cuts_of_a_request_shape_its_drafts() -> None:
    world = World(FakeDeviceModel())
    world.admit(0, PROMPT, Sampling(temperature=0.8, top_k=3))
    world.draft.exchange(world.outcomes({0: (0, 5)}))
    assert (world.engine.state.log_q[0] > -torch.inf).sum(-1).eq(3).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_happens_every_branch_says_what_the_draft_model_says(data: st.DataObject) -> None:
    drafts = data.draw(st.integers(1, 5), "K")
    block_size = data.draw(st.integers(1, 6), "block size")
    slots = data.draw(st.integers(1, 5), "slots")
    model = FakeDeviceModel(
        block_size=block_size,
        num_blocks=data.draw(st.sampled_from([40, 120, 600]), "blocks"),
        max_length=data.draw(st.integers(20, 48), "longest"),
        max_tokens=data.draw(st.integers(4, 40), "piece"),
        vocab_size=data.draw(st.sampled_from([4, 40, 90]), "vocabulary"),
        seed=data.draw(st.integers(1, 5), "language"),
    )
    branches = data.draw(st.integers(1, 9), "N")
    world = World(model, slots=slots, drafts=drafts, branches=branches, max_rows=data.draw(st.integers(1, 20), "rows"))
    token = st.integers(0, model.vocab_size - 1)
    for _ in range(data.draw(st.integers(1, 14), "steps")):
        for slot in range(slots):
            act = data.draw(st.integers(0, 9), f"slot {slot}")
            if slot in world.requests and act == 0:
                world.release(slot)
            elif (slot not in world.requests and act > 3) or act == 1:
                text = data.draw(st.lists(token, min_size=1, max_size=model.max_length - 1), "text")
                temperature = data.draw(st.sampled_from([0.0, 0.0, 0.9]), "temperature")
                world.admit(slot, text, Sampling(temperature=temperature))
        found: dict[int, Outcome | None] = {}
        for slot in data.draw(st.permutations(list(world.requests)), "order"):
            table = world.table(slot)
            kind = data.draw(st.integers(0, 9), "kind")
            if kind == 0:
                continue
            if kind == 1:
                found[slot] = None
            elif table and kind > 3:
                found[slot] = data.draw(st.sampled_from([key for key, _, _ in table]), "hit")
            else:
                k = data.draw(st.integers(0, len(world.requests[slot].drafts)), "k")
                found[slot] = (k, data.draw(token, "t*"))
        if found:
            world.step(found)
