"""Outcomes that the target waits at: their drafts come before anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.drafting.checks import COUPLED, GREEDY, SAMPLED, SEEDED
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.loop_driver import LoopDriver, Request, request
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro.messages import Outcome, Sampling, Stamp, Table, Want

K = 3
KINDS = pytest.mark.parametrize("sampling", [GREEDY, COUPLED, SAMPLED, SEEDED], ids=["T=0", "key", "sampled", "seed"])


def started(*requests: Request, model: FakeModel | None = None, turns: int = 1000) -> LoopDriver:
    driver = LoopDriver(model or FakeModel(num_blocks=256), K)
    driver.submit([r.admit() for r in requests])
    driver.work(turns)
    return driver


def unforeseen(table: Table | None, accepted: int = 0) -> int:
    assert table is not None
    return next(token for token in range(40) if table.find(accepted, token) is None)


def outcome_of(driver: LoopDriver, r: Request, branch: int = 0) -> Outcome:
    """The outcome that a branch of the newest table predicted, with its drafts."""
    table = driver.check_table(r)
    return r.outcome(table.accepted[branch], table.bonus[branch], table.speculation(branch))


def finish(driver: LoopDriver, *requests: Request) -> None:
    """The next rounds are right and no block is lost."""
    for _ in range(2):
        driver.work()
        for r in requests:
            assert len(driver.check_table(r).drafts) == K
            assert len(driver.check_table(r).bonus) == 4
        driver.submit(outcomes=[outcome_of(driver, r) for r in requests])
    driver.submit(releases=[r.release() for r in requests])
    driver.work()
    assert driver.engine.pool.num_free == driver.engine.pool.num_blocks


@KINDS
def test_the_table_becomes_the_one_branch_that_is_wanted(sampling: Sampling) -> None:
    r = request(0, 9, sampling=sampling)
    driver = started(r)
    bonus = unforeseen(driver.table_of(r))
    driver.history.clear()
    driver.model.batches.clear()
    driver.submit(wants=[r.want(0, bonus, 2)])
    assert driver.history == [(r.stamp, 0)]
    driver.work()
    assert driver.history == [(r.stamp, depth) for depth in range(3)]  # as deep as wanted, under the same stamp
    assert driver.model.batches == [(1, 1)] * 2
    table = driver.check_table(r)
    assert (list(table.accepted), list(table.bonus)) == ([0], [bonus])

    driver.submit(outcomes=[outcome_of(driver, r)])
    driver.model.batches.clear()
    driver.loop.advance()
    assert driver.model.batches == [(1, 1)]  # adopted: the last draft alone lacks its KV
    finish(driver, r)


@KINDS
def test_with_drafts_under_verification_any_length_may_be_wanted(sampling: Sampling) -> None:
    for accepted in range(K + 1):
        r = request(0, 9, sampling=sampling)
        driver = started(r)
        driver.submit(outcomes=[outcome_of(driver, r)])
        driver.work()
        bonus = next(t for t in range(40) if driver.check_table(r).find(accepted, t) is None and t not in r.drafts)
        driver.submit(wants=[r.want(accepted, bonus, K)])
        driver.work()
        assert list(driver.check_table(r).accepted) == [accepted]
        driver.submit(outcomes=[outcome_of(driver, r)])
        finish(driver, r)


@KINDS
def test_what_the_growing_tree_has_is_published_again_alone(sampling: Sampling) -> None:
    r = request(0, 9, sampling=sampling)
    driver = started(r, turns=4)
    before = driver.check_table(r)
    depth = len(before.drafts)
    assert 0 < depth < K
    driver.history.clear()
    driver.submit(wants=[r.want(0, before.bonus[2], K)])
    assert driver.history == [(r.stamp, d) for d in range(depth + 1)]
    table = driver.check_table(r)
    assert list(table.bonus) == [before.bonus[2]]
    assert table.speculation(0) == before.speculation(2)
    driver.model.batches.clear()
    driver.work()
    assert driver.model.batches == [(1, 1)] * (K - depth)
    assert driver.check_table(r).speculation(0)[:depth] == before.speculation(2)
    driver.submit(outcomes=[outcome_of(driver, r)])
    finish(driver, r)


@KINDS
def test_an_outcome_takes_as_many_of_the_drafts_as_there_were(sampling: Sampling) -> None:
    r = request(0, 9, sampling=sampling)
    driver = started(r)
    driver.submit(wants=[r.want(0, unforeseen(driver.table_of(r)), K)])
    driver.work(2)
    table = driver.check_table(r)
    assert len(table.drafts) == 2
    driver.submit(outcomes=[r.outcome(0, table.bonus[0], table.speculation(0)[:1])])  # and the tree was still growing
    finish(driver, r)


def test_an_outcome_other_than_the_wanted_one_is_a_miss() -> None:
    r = request(0, 9)
    driver = started(r)
    bonus = unforeseen(driver.table_of(r))
    driver.submit(wants=[r.want(0, bonus, K)])
    driver.work(1)
    driver.submit(outcomes=[r.outcome(0, (bonus + 1) % 40)])
    finish(driver, r)


# ---- what must be ignored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamp", [Stamp(0, 1, 1), Stamp(0, 2, 0), Stamp(0, 0, 0), Stamp(5, 1, 0)])
@pytest.mark.parametrize("turns", [3, 1000])
def test_a_stale_want_is_ignored(stamp: Stamp, turns: int) -> None:
    r = request(0, 9)
    driver = started(r, turns=turns)
    count = len(driver.history)
    driver.submit(wants=[replace(r.want(0, unforeseen(driver.table_of(r)), 2), stamp=stamp)])
    assert len(driver.history) == count
    finish(driver, r)


@pytest.mark.parametrize(("accepted", "bonus"), [(1, 5), (0, 40), (0, 10**6)])
def test_a_want_for_what_cannot_be_is_ignored(accepted: int, bonus: int) -> None:
    r = request(0, 9)
    driver = started(r, turns=3)
    count = len(driver.history)
    driver.submit(wants=[r.want(accepted, bonus, 2)])
    assert len(driver.history) == count
    finish(driver, r)


def test_a_want_while_the_prompt_is_read_is_ignored() -> None:
    r, other = request(0, 60 - 2 * K), request(1, 9)
    driver = started(r, other, model=FakeModel(num_blocks=256, max_tokens=8), turns=3)
    assert driver.table_of(r) is None
    count = len(driver.history)
    driver.submit(wants=[r.want(0, 7, 2)])
    assert len(driver.history) == count
    driver.work()
    assert len(driver.check_table(r).bonus) == len(driver.check_table(other).bonus) == 4


def test_a_want_before_anything_was_fed_is_ignored() -> None:
    r = request(0, 9)
    driver = LoopDriver(FakeModel(num_blocks=256), K)
    driver.submit([r.admit()], wants=[r.want(0, 7, 2)])
    assert driver.history == []
    finish(driver, r)


def test_without_room_nothing_is_published_and_the_outcome_is_a_miss() -> None:
    r = request(0, 9)
    driver = started(r, model=FakeModel(num_blocks=3))
    driver.history.clear()
    driver.submit(wants=[r.want(0, 7, 2)])
    driver.work()
    assert driver.history == []
    driver.submit(outcomes=[r.outcome(0, 7)])
    driver.submit(releases=[r.release()])
    driver.work()
    assert driver.engine.pool.num_free == 3


# ---- several requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_others_in_the_growing_tree_wait_for_the_outcomes_and_begin_again(found: bool, turns: int) -> None:
    # Prompts that are short enough for one round together.
    r, other = request(0, 4, sampling=SAMPLED), request(1, 3, sampling=COUPLED)
    driver = started(r, other, turns=turns)
    table = driver.check_table(r)
    assert len(table.drafts) == len(driver.check_table(other).drafts) == turns - 1 < K
    bonus = table.bonus[1] if found else unforeseen(table)
    driver.history.clear()
    driver.submit(wants=[r.want(0, bonus, K)])
    while len(driver.check_table(r).drafts) < K:
        assert {stamp.slot for stamp, _ in driver.history} == {0}, "the wanted drafts come first"
        driver.loop.advance()
    batches = len(driver.model.batches)
    assert driver.work() == 0
    assert len(driver.model.batches) == batches, "no forward stands in the way of outcomes that are about to come"
    assert len(driver.check_table(r).bonus) == 1
    driver.submit(outcomes=[outcome_of(driver, r)])
    finish(driver, r, other)


def test_a_round_that_was_begun_again_tells_nothing_of_the_time_that_glue_takes() -> None:
    r, other = request(0, 4), request(1, 3)
    driver = started(r, other)
    glue: list[float] = []
    driver.loop.engine.pace.observe_glue = glue.append  # type: ignore[method-assign, assignment]
    driver.submit(outcomes=[outcome_of(driver, r), outcome_of(driver, other)])
    driver.work(2)
    assert len(glue) == 1
    driver.submit(wants=[r.want(0, unforeseen(driver.check_table(r)), K)])
    driver.submit(releases=[r.release()])
    driver.work()
    assert len(driver.check_table(other).drafts) == K
    assert len(glue) == 1
    driver.submit(outcomes=[outcome_of(driver, other)])
    finish(driver, other)


@pytest.mark.parametrize("found", [True, False])
def test_a_want_leaves_the_finished_tables_of_others_alone(found: bool) -> None:
    """The target may have read its table before that was finished, and the others are not in this step."""
    r, other = request(0, 4), request(1, 3)
    driver = started(r, other)
    table = driver.check_table(r)
    driver.submit(wants=[r.want(0, table.bonus[2] if found else unforeseen(table), K)])
    driver.work()
    driver.submit(outcomes=[outcome_of(driver, r), outcome_of(driver, other, 3)])
    finish(driver, r, other)


def test_a_request_whose_tree_was_stopped_is_wanted_before_it_began_again() -> None:
    other, r = request(0, 4), request(1, 3)
    driver = started(other, r, turns=2)
    bonus = unforeseen(driver.check_table(r))
    driver.submit(outcomes=[outcome_of(driver, other)])
    driver.submit(wants=[r.want(0, bonus, K)])
    driver.work()
    table = driver.check_table(r)
    assert (list(table.bonus), len(table.drafts)) == ([bonus], K)  # not the whole table of that round after all
    driver.submit(outcomes=[outcome_of(driver, r)])
    finish(driver, other, r)


def test_several_wants_grow_in_one_tree_as_deep_as_the_deepest() -> None:
    requests = [request(slot, 5 + slot, sampling=kind) for slot, kind in enumerate((GREEDY, COUPLED, SAMPLED))]
    driver = started(*requests)
    driver.model.batches.clear()
    bonuses = [unforeseen(driver.table_of(r)) for r in requests]
    driver.submit(wants=[r.want(0, bonus, depth) for r, bonus, depth in zip(requests, bonuses, (1, 3, 2), strict=True)])
    driver.work()
    assert driver.model.batches == [(3, 3)] * 3
    for r, bonus in zip(requests, bonuses, strict=True):
        assert list(driver.check_table(r).bonus) == [bonus]
    driver.submit(outcomes=[outcome_of(driver, r) for r in requests])
    finish(driver, *requests)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_wanted_when_every_table_is_right_and_no_block_is_lost(data: st.DataObject) -> None:
    num_blocks = data.draw(st.sampled_from([24, 256]))
    driver = LoopDriver(FakeModel(num_blocks=num_blocks, max_tokens=64, max_length=96), K, branches=3)
    target = SimulatedTarget(driver.model)
    kinds = st.sampled_from([GREEDY, SAMPLED, COUPLED, SEEDED])
    running = [request(slot, data.draw(st.integers(1, 20)), sampling=data.draw(kinds)) for slot in range(3)]
    driver.submit([r.admit() for r in running])
    for _ in range(12):
        driver.work(most=data.draw(st.integers(0, 6)))
        here = [r for r in running if data.draw(st.integers(0, 3))]  # the others are not in this step
        verified = {r.stamp.slot: target.verify(r.tokens, r.drafts) for r in here}
        wants = list[Want]()
        for r in here:
            *accepted, bonus = verified[r.stamp.slot]
            table = driver.table_of(r)
            if table is None or table.find(len(accepted), bonus) is None or data.draw(st.booleans()):
                wants.append(r.want(len(accepted), bonus, data.draw(st.integers(1, K))))
        if data.draw(st.booleans()) and wants:
            driver.submit(wants=wants)
            driver.work(most=data.draw(st.integers(0, 4)))
        for r in running:
            if driver.table_of(r) is not None:
                driver.check_table(r)
        driver.submit(outcomes=[driver.verify(r, target)[0] for r in here])
    driver.submit(releases=[r.release() for r in running])
    driver.work()
    assert driver.engine.pool.num_free == num_blocks
