"""Branches for outcomes that are known already: drafts just in time."""

from __future__ import annotations

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
    dense,
    grown,
    make_engine,
    prefill,
    ready,
    speculation,
)
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import Trunk
from vllm_saguaro.messages import Sampling

K = 4
KINDS = pytest.mark.parametrize("sampling", [GREEDY, COUPLED, SAMPLED, SEEDED], ids=["T=0", "key", "sampled", "seed"])


def engine_of(num_blocks: int = 256, branches: int = 6) -> DraftEngine:
    return make_engine(FakeModel(num_blocks=num_blocks), K, branches, deflations=Deflations(K, 0.3))


def verifying(engine: DraftEngine, sampling: Sampling, length: int = 11, depth: int = K) -> Trunk:
    """A request in its second round, with K drafts under verification and a tree `depth` deep."""
    trunk = ready(engine, PROMPT[:length], sampling)
    grown(engine, [trunk])
    engine.settle(trunk, 0, trunk.branches[0].bonus, speculation(engine, trunk, 0))
    prefill(engine, [trunk])
    grown(engine, [trunk], depth)
    return trunk


def unforeseen(trunk: Trunk, accepted: int) -> int:
    return next(t for t in range(40) if trunk.branch_of(accepted, t) is None and t not in trunk.speculation)


def deepest(trunk: Trunk) -> int:
    """The branch with the most drafts accepted."""
    return max(range(len(trunk.branches)), key=lambda i: trunk.branches[i].accepted)


def finish(engine: DraftEngine, trunks: list[Trunk]) -> None:
    """All outcomes adopt what was drafted; the next round is right, and no block is lost."""
    for trunk in trunks:
        (branch,) = trunk.branches
        drafts = speculation(engine, trunk, 0)
        assert engine.settle(trunk, branch.accepted, branch.bonus, drafts)
        assert (trunk.speculation, trunk.pending(), trunk.backup) == (drafts, drafts[-1:], False)
    check_blocks(engine, trunks)
    prefill(engine, trunks)
    grown(engine, trunks)
    for trunk in trunks:
        check_predictions(engine, trunk)
        check_drafts(engine, trunk)
    for trunk in trunks:
        engine.release(trunk)
    assert engine.pool.num_free == engine.pool.num_blocks


# ---- found in the tree ----------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("depth", [1, 2, K])
def test_what_the_tree_has_of_an_outcome_is_gone_on_with(sampling: Sampling, depth: int) -> None:
    engine = engine_of()
    trunk = verifying(engine, sampling, depth=depth)
    i = deepest(trunk)
    branch, drafts = trunk.branches[i], speculation(engine, trunk, i)
    q = [engine.q_of(trunk, d) for d in range(depth)]
    tree = engine.pursue([(trunk, branch.accepted, branch.bonus)], K)
    assert tree is trunk.tree
    assert tree is not None
    assert trunk.branches == [branch]
    assert (tree.depth, tree.depth_limit, len(tree.next_ids), branch.row) == (depth, K, 1, 0)
    assert speculation(engine, trunk, 0) == drafts
    for d, before in enumerate(q):
        after = engine.q_of(trunk, d)
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert torch.equal(dense(after, 40)[0], dense(before, 40)[i])
    check_blocks(engine, [trunk])  # those of the other branches are free, and wiped
    while not tree.finished:
        engine.grow(tree)
    assert speculation(engine, trunk, 0)[:depth] == drafts
    check_drafts(engine, trunk)
    finish(engine, [trunk])


@KINDS
def test_branches_of_several_requests_are_kept_in_the_order_that_was_asked_for(sampling: Sampling) -> None:
    engine = engine_of()
    trunks = [ready(engine, PROMPT[:length], kind) for length, kind in ((5, sampling), (8, GREEDY), (11, sampling))]
    grown(engine, trunks, 2)
    wanted = [(trunks[2], 0, trunks[2].branches[3].bonus), (trunks[0], 0, trunks[0].branches[1].bonus)]
    drafts = [speculation(engine, trunks[2], 3), speculation(engine, trunks[0], 1)]
    engine.drop_branches(trunks[1])  # as the loop does with all that are not wanted
    tree = engine.pursue(wanted, 3)
    assert tree is not None
    assert (tree.depth, len(tree.next_ids)) == (2, 2)
    assert [speculation(engine, trunk, 0) for trunk, *_ in wanted] == drafts
    check_blocks(engine, trunks)
    engine.grow(tree)
    assert tree.finished
    for trunk, *_ in wanted:
        check_drafts(engine, trunk)
    engine.release(trunks[1])
    finish(engine, [trunk for trunk, *_ in wanted])


@pytest.mark.parametrize(("depth", "asked", "limit"), [(1, 3, 3), (3, 1, 3), (2, 99, K)])
def test_a_tree_grows_as_deep_as_asked_but_for_what_is_there(depth: int, asked: int, limit: int) -> None:
    engine = engine_of()
    trunk = verifying(engine, GREEDY, depth=depth)
    tree = engine.pursue([(trunk, trunk.branches[0].accepted, trunk.branches[0].bonus)], asked)
    assert tree is not None
    assert tree.depth_limit == limit


def test_the_other_requests_of_a_finished_tree_keep_what_they_have() -> None:
    """A want may come for one of them late, when its own table is finished; the others' tables stand."""
    engine = engine_of()
    wanted, other = ready(engine, PROMPT[:6], SAMPLED), ready(engine, PROMPT, GREEDY)
    grown(engine, [wanted, other])
    drafts = [speculation(engine, other, i) for i in range(len(other.branches))]
    assert engine.pursue([(wanted, 0, wanted.branches[2].bonus)], 2) is not None
    assert [speculation(engine, other, i) for i in range(len(other.branches))] == drafts
    assert engine.settle(other, 0, other.branches[1].bonus, drafts[1])
    prefill(engine, [other])
    grown(engine, [other])
    check_predictions(engine, other)
    check_drafts(engine, other)
    check_blocks(engine, [wanted, other])


# ---- not found ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("accepted", [0, 2, K])
@pytest.mark.parametrize("depth", [0, 2])
def test_an_outcome_that_was_not_predicted_gets_a_branch_of_its_own(
    sampling: Sampling, accepted: int, depth: int
) -> None:
    engine = engine_of()
    trunk = verifying(engine, sampling, depth=depth)
    bonus = unforeseen(trunk, accepted)
    tree = engine.pursue([(trunk, accepted, bonus)], 3)
    assert tree is trunk.tree
    assert tree is not None
    assert [(branch.accepted, branch.bonus) for branch in trunk.branches] == [(accepted, bonus)]
    assert (tree.depth, tree.depth_limit, len(tree.next_ids)) == (0, 3, 1)
    check_blocks(engine, [trunk])
    while not tree.finished:
        engine.grow(tree)
    check_drafts(engine, trunk)
    finish(engine, [trunk])


def test_what_the_tree_has_at_depth_nothing_is_begun_anew() -> None:
    engine = engine_of()
    trunk = verifying(engine, GREEDY, depth=0)
    old, branch = trunk.tree, trunk.branches[1]
    tree = engine.pursue([(trunk, branch.accepted, branch.bonus)], K)
    assert tree is not old
    assert tree is not None
    assert len(trunk.branches) == len(tree.next_ids) == 1
    check_blocks(engine, [trunk])


def test_if_one_of_several_is_not_found_all_begin_anew() -> None:
    engine = engine_of()
    trunks = [ready(engine, PROMPT[:5]), ready(engine, PROMPT, COUPLED)]
    grown(engine, trunks, 2)
    wanted = [(trunks[0], 0, trunks[0].branches[1].bonus), (trunks[1], 0, unforeseen(trunks[1], 0))]
    tree = engine.pursue(wanted, 2)
    assert tree is not None
    assert (tree.depth, len(tree.next_ids)) == (0, 2)
    check_blocks(engine, trunks)
    while not tree.finished:
        engine.grow(tree)
    for trunk in trunks:
        check_drafts(engine, trunk)
    finish(engine, trunks)


def test_trees_of_their_own_are_not_one_tree() -> None:
    engine = engine_of()
    trunks = [ready(engine, PROMPT[:5]), ready(engine, PROMPT)]
    for trunk in trunks:
        grown(engine, [trunk], 2)
    tree = engine.pursue([(trunk, 0, trunk.branches[1].bonus) for trunk in trunks], 2)
    assert tree is not None
    assert all(trunk.tree is tree for trunk in trunks)
    assert (tree.depth, len(tree.next_ids)) == (0, 2)
    check_blocks(engine, trunks)


def test_an_outcome_is_pursued_before_there_was_any_tree() -> None:
    engine = engine_of()
    trunk = ready(engine)
    tree = engine.pursue([(trunk, 0, 7)], 2)
    assert tree is not None
    while not tree.finished:
        engine.grow(tree)
    check_drafts(engine, trunk)
    finish(engine, [trunk])


# ---- the end of room ------------------------------------------------------------------------------------------------


def test_without_room_there_is_no_tree_and_nothing_is_lost() -> None:
    engine = engine_of(num_blocks=3)
    trunk = ready(engine)
    assert engine.pursue([(trunk, 0, 7)], 2) is None
    assert (trunk.branches, trunk.tree) == ([], None)
    check_blocks(engine, [trunk])
    assert not engine.settle(trunk, 0, 7, [])


def test_an_outcome_at_the_maximum_length_gets_no_branch() -> None:
    engine = make_engine(FakeModel(max_length=14), K)
    trunk = ready(engine)
    assert engine.pursue([(trunk, 0, 7)], 1) is None
    check_blocks(engine, [trunk])


def test_another_outcome_than_the_pursued_one_is_a_miss() -> None:
    engine = engine_of()
    trunk = verifying(engine, SAMPLED)
    tree = engine.pursue([(trunk, 1, unforeseen(trunk, 1))], 2)
    assert tree is not None
    engine.grow(tree)
    assert not engine.settle(trunk, 0, 5, [])
    check_blocks(engine, [trunk])
    prefill(engine, [trunk])
    grown(engine, [trunk])
    check_predictions(engine, trunk)
