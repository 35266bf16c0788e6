from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.drafting.checks import (
    COUPLED,
    GREEDY,
    PROMPT,
    SAMPLED,
    SEEDED,
    check_blocks,
    check_drafts,
    check_predictions,
    expected_outcomes,
    fake_of,
    grown,
    make_engine,
    prefill,
    ready,
    speculation,
)
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import PLAIN, Tree, Trunk
from vllm_saguaro.messages import Sampling

K = 3


def test_branches_draft_the_greedy_continuation_of_their_outcome() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    tree = grown(engine, [trunk])
    assert tree.finished
    assert len(trunk.branches) == 4
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)
    check_blocks(engine, [trunk])


def test_a_hit_moves_no_kv_and_needs_one_glue_token() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    grown(engine, [trunk])
    branch, drafts = trunk.branches[1], speculation(engine, trunk, 1)
    assert engine.settle(trunk, 0, branch.bonus, drafts)
    assert trunk.tokens == [*PROMPT, branch.bonus]
    assert trunk.speculation == drafts
    assert trunk.pending() == drafts[-1:]
    check_blocks(engine, [trunk])
    prefill(engine, [trunk])
    grown(engine, [trunk])
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)


def test_a_miss_keeps_the_kv_of_accepted_drafts() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    grown(engine, [trunk])
    text = trunk.tokens + trunk.speculation[:2]
    impossible = trunk.speculation[2]  # a rejected draft is never predicted as the bonus token
    assert not engine.settle(trunk, 2, impossible, [])
    assert trunk.tokens == [*text, impossible]
    assert trunk.pending() == [impossible]
    check_blocks(engine, [trunk])
    prefill(engine, [trunk])
    grown(engine, [trunk])
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)


def test_a_hit_with_an_unfinished_tree_adopts_what_is_there() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    grown(engine, [trunk], depth=2)
    drafts = speculation(engine, trunk, 0)
    assert len(drafts) == 2
    assert engine.settle(trunk, 0, trunk.branches[0].bonus, drafts)
    assert trunk.pending() == drafts[-1:]
    check_blocks(engine, [trunk])


def test_drafts_from_elsewhere_are_not_taken_for_the_branchs_own() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    grown(engine, [trunk])
    bonus, own = trunk.branches[0].bonus, speculation(engine, trunk, 0)
    elsewhere = [own[0], (own[1] + 1) % 40, 5]
    assert not engine.settle(trunk, 0, bonus, elsewhere)
    assert trunk.pending() == [bonus, *elsewhere]
    prefill(engine, [trunk])
    grown(engine, [trunk])
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)


def test_an_outcome_before_the_tree_has_grown_is_no_adoption() -> None:
    engine = make_engine(FakeModel())
    trunk = ready(engine)
    grown(engine, [trunk], depth=0)
    bonus = trunk.branches[0].bonus
    assert not engine.settle(trunk, 0, bonus, [])
    assert trunk.pending() == [bonus]
    check_blocks(engine, [trunk])


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 11])
def test_a_prompt_in_chunks_predicts_as_one_in_one_piece(chunk: int) -> None:
    engine = make_engine(FakeModel())
    trunk = engine.admit(list(PROMPT), GREEDY)
    prefill(engine, [trunk], most=chunk)
    assert max(tokens for _, tokens in fake_of(engine).batches) == chunk
    assert trunk.hidden is not None
    assert torch.equal(engine.model.logits(trunk.hidden)[-1], fake_of(engine).logits_after(PROMPT))
    grown(engine, [trunk])
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)


def test_trunks_of_unlike_lengths_grow_in_one_tree() -> None:
    engine = make_engine(FakeModel())
    trunks = [ready(engine, PROMPT[:length]) for length in (1, 4, 7, 8)]
    grown(engine, [trunks[0]])
    engine.settle(trunks[0], 0, trunks[0].branches[0].bonus, speculation(engine, trunks[0], 0))
    prefill(engine, trunks)
    tree = grown(engine, trunks)  # one with drafts under verification, three without
    assert len(tree.next_ids) == 16
    for trunk in trunks:
        check_predictions(engine, trunk)
        check_drafts(engine, trunk)
    check_blocks(engine, trunks)


@pytest.mark.parametrize("fan_out", ["ranked", "geometric", "uniform"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, COUPLED, SEEDED])
def test_every_fan_out_drafts_correctly(fan_out: str, sampling: Sampling) -> None:
    engine = make_engine(FakeModel(), branches=6, fan_out=fan_out)
    trunk = ready(engine, sampling=sampling)
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    grown(engine, [trunk])
    assert len(trunk.branches) == 6
    check_predictions(engine, trunk)
    check_drafts(engine, trunk)


@pytest.mark.parametrize("fan_out", ["ranked", "geometric", "uniform"])
def test_a_share_of_one_branch_is_enough(fan_out: str) -> None:
    engine = make_engine(FakeModel(), branches=6, fan_out=fan_out)
    trunk = ready(engine)
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    tree = engine.fork([trunk], branches=1)
    assert tree is not None
    assert len(trunk.branches) == 1


def test_a_vocabulary_smaller_than_the_fan_out_gives_fewer_branches() -> None:
    engine = make_engine(FakeModel(vocab_size=4), branches=9)
    trunk = ready(engine, [1, 2, 3])
    tree = grown(engine, [trunk])
    assert len(tree.next_ids) == len(trunk.branches) == 4
    check_drafts(engine, trunk)


# ---- where room is short --------------------------------------------------------------------------------------------


def test_short_of_blocks_the_likeliest_branches_get_them() -> None:
    model = FakeModel(num_blocks=3 + 2 * 2)
    engine = make_engine(model, branches=6)
    trunk = ready(engine)
    roomy = make_engine(FakeModel(), branches=6)
    other = ready(roomy)
    grown(roomy, [other])
    tree = grown(engine, [trunk])
    assert len(tree.next_ids) == len(trunk.branches) == 2
    assert outcomes_of(trunk) == outcomes_of(other)[:2]
    check_drafts(engine, trunk)
    check_blocks(engine, [trunk])


@pytest.mark.parametrize("fan_out", ["geometric", "uniform"])
def test_short_of_blocks_fixed_fan_outs_keep_their_likeliest_branches(fan_out: str) -> None:
    """`fork`: "where blocks run short the least likely branches go without", whatever order the rule lists them in."""
    roomy, scarce = ready_for_second_round(fan_out), ready_for_second_round(fan_out)
    scarce[0].pool.take(scarce[0].pool.num_free - 4)
    for engine, trunk in (roomy, scarce):
        engine.fork([trunk])
    wanted = expected_outcomes(*roomy)
    kept = outcomes_of(scarce[1])
    assert 0 < len(kept) < len(wanted)
    assert set(kept) == set(wanted[: len(kept)])


def ready_for_second_round(fan_out: str) -> tuple[DraftEngine, Trunk]:
    engine = make_engine(FakeModel(), branches=8, fan_out=fan_out)
    trunk = ready(engine)
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    return engine, trunk


def outcomes_of(trunk: Trunk) -> list[tuple[int, int]]:
    return [(branch.accepted, branch.bonus) for branch in trunk.branches]


def test_without_any_block_there_is_no_tree_and_the_trunk_goes_on() -> None:
    engine = make_engine(FakeModel(num_blocks=3))
    trunk = ready(engine)
    assert engine.fork([trunk]) is None
    assert trunk.branches == []
    assert trunk.tree is None
    assert not engine.settle(trunk, 0, 5, [])
    prefill(engine, [trunk])
    check_blocks(engine, [trunk])


def test_a_trunk_without_room_is_passed_over_and_the_others_are_fed() -> None:
    engine = make_engine(FakeModel(num_blocks=4))
    long, short = engine.admit([1] * 17, GREEDY), engine.admit([2] * 5, GREEDY)
    engine.extend([long, short], 64)
    assert (long.valid, short.valid) == (0, 5)
    check_blocks(engine, [long, short])
    engine.release(short)
    engine.extend([long], 8)
    assert long.valid == 8


def test_shortage_of_one_trunk_leaves_the_others_branches_right() -> None:
    model = FakeModel(num_blocks=9)
    engine = make_engine(model)
    trunks = [ready(engine, PROMPT[:length]) for length in (5, 9)]
    tree = grown(engine, trunks)
    assert 0 < len(tree.next_ids) < 8
    for trunk in trunks:
        check_drafts(engine, trunk)
        assert engine.settle(trunk, 0, 39, []) is any(branch.bonus == 39 for branch in trunk.branches)
    check_blocks(engine, trunks)
    prefill(engine, trunks)


def test_branches_that_would_run_past_the_maximum_length_are_left_out() -> None:
    engine = make_engine(FakeModel(max_length=12, num_blocks=64))
    trunk = ready(engine, PROMPT[:9])  # positions 9, 10, 11: exactly as long as allowed
    assert len(grown(engine, [trunk]).next_ids) == 4
    check_drafts(engine, trunk)
    engine.settle(trunk, 0, trunk.branches[0].bonus, [])
    prefill(engine, [trunk])
    assert engine.fork([trunk]) is None
    check_blocks(engine, [trunk])


def test_only_outcomes_that_fit_get_branches_near_the_maximum_length() -> None:
    engine = make_engine(FakeModel(max_length=13, num_blocks=64), branches=12, fan_out="uniform")
    trunk = ready(engine, PROMPT[:8])
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    grown(engine, [trunk])
    assert {branch.accepted for branch in trunk.branches} == {0, 1}  # the bonus token at 9 or 10, K = 3 positions
    check_drafts(engine, trunk)


def test_a_full_text_can_be_held_to_the_last_position() -> None:
    engine = make_engine(FakeModel(max_length=8))
    trunk = ready(engine, PROMPT[:8])
    assert trunk.valid == 8
    assert engine.fork([trunk]) is None


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, K])
def test_release_gives_back_trunk_and_branches(depth: int) -> None:
    engine = make_engine(FakeModel())
    trunk, other = ready(engine), ready(engine, PROMPT[:6])
    grown(engine, [trunk, other], depth)
    engine.release(trunk)
    check_blocks(engine, [other])
    assert engine.settle(other, 0, other.branches[2].bonus, []) is (depth > 0)
    engine.release(other)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_finished_tree_says_so() -> None:
    rule = make_engine(FakeModel()).drawer.rule([(Trunk([1], GREEDY), 1)], 1, PLAIN)
    tree = Tree(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 1), np.int32), depth_limit=1, rule=rule)
    assert not tree.finished
    tree.drafts.append(np.zeros(1, np.int64))
    assert tree.finished
    assert tree.depth == 1
