"""What the draft loop tells of its rounds: every piece of work once, with its parts in order."""

from __future__ import annotations

from itertools import count, pairwise

from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.loop_driver import LoopDriver, request
from vllm_saguaro.drafting.diary import Diary, KeptDiary, diary
from vllm_saguaro.messages import Round, Work

K, BRANCHES = 3, 4


def kept() -> tuple[KeptDiary, list[Round]]:
    """A diary whose clock goes on by ten at each look."""
    found: list[Round] = []
    clock = count(10, 10)
    return KeptDiary(found.append, lambda: next(clock)), found


def driven(num_blocks: int = 256) -> tuple[LoopDriver, list[Round]]:
    driver = LoopDriver(FakeModel(num_blocks=num_blocks), K, BRANCHES)
    found: list[Round] = []
    driver.loop._diary = KeptDiary(found.append)
    return driver, found


# ---- the diary ------------------------------------------------------------------------------------------------------


def test_a_round_has_its_parts() -> None:
    notes, found = kept()
    notes.begin(2)
    notes.glued()
    notes.forked(4)
    notes.grown()
    notes.grown()
    assert found == []
    notes.end()
    notes.end()
    assert found == [Round(Work.ROUND, 10, 20, 30, 50, 2, 4)]


def test_a_round_that_was_cut_short_ends_with_what_it_had() -> None:
    notes, found = kept()
    notes.begin(2)
    notes.glued()
    notes.begin(3)
    notes.end()
    assert found == [Round(Work.ROUND, 10, 20, 20, 20, 2, 0), Round(Work.ROUND, 30, 30, 30, 30, 3, 0)]


def test_a_pursuit_has_no_glue() -> None:
    notes, found = kept()
    notes.begin(1, Work.PURSUIT)
    notes.forked(1)
    notes.grown()
    notes.end()
    assert found == [Round(Work.PURSUIT, 10, 10, 20, 30, 1, 1)]


def test_a_piece_of_a_text_is_told_at_once() -> None:
    notes, found = kept()
    notes.read(notes.now(), 17)
    assert found == [Round(Work.PROMPT, 10, 20, 20, 20, 17, 0)]


def test_where_nobody_asks_nothing_is_kept() -> None:
    notes = diary(None)
    assert type(notes) is Diary
    notes.begin(1)
    notes.glued()
    notes.forked(1)
    notes.grown()
    notes.read(notes.now(), 1)
    notes.end()
    assert vars(notes) == {}
    assert type(diary(lambda one: None)) is KeptDiary


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_a_text_and_its_rounds_are_told_in_their_order() -> None:
    driver, found = driven()
    r = request(0, 9)
    driver.submit([r.admit()])
    driver.work()
    for _ in range(3):
        table = driver.check_table(r)
        driver.submit(outcomes=[r.outcome(table.accepted[0], table.bonus[0], table.speculation(0))])
        driver.work()
    assert [one.work for one in found] == [Work.PROMPT, *[Work.ROUND] * 4]
    assert found[0].rows == 9
    assert {(one.rows, one.branches) for one in found[1:]} == {(1, BRANCHES)}
    for one in found[1:]:
        assert one.began < one.glued < one.forked < one.ended
    assert all(before.ended <= after.began for before, after in pairwise(found))


def test_requests_that_are_drafted_for_together_are_one_round() -> None:
    driver, found = driven()
    requests = [request(slot, 9) for slot in range(2)]
    driver.submit([r.admit() for r in requests])
    driver.work()
    found.clear()
    driver.submit(outcomes=[r.outcome(0, 7) for r in requests])
    driver.work()
    assert [(one.work, one.rows) for one in found] == [(Work.ROUND, 2)]


def test_an_outcome_ends_the_round_that_is_under_way() -> None:
    driver, found = driven()
    r = request(0, 9)
    driver.submit([r.admit()])
    driver.work(2)  # the text, then glue and fork
    assert [one.work for one in found] == [Work.PROMPT]
    driver.submit(outcomes=[r.outcome(0, 7)])
    assert [one.work for one in found] == [Work.PROMPT, Work.ROUND]
    assert found[1].forked == found[1].ended


def test_a_request_that_leaves_ends_its_round() -> None:
    driver, found = driven()
    r = request(0, 9)
    driver.submit([r.admit()])
    driver.work(3)
    driver.submit(releases=[r.release()])
    assert [one.work for one in found] == [Work.PROMPT, Work.ROUND]
    driver.work()
    assert len(found) == 2


def test_drafts_made_just_in_time_are_a_pursuit() -> None:
    driver, found = driven()
    r = request(0, 9)
    driver.submit([r.admit()])
    driver.work()
    driver.submit(wants=[r.want(0, 7, 2)])
    driver.work()
    assert [one.work for one in found] == [Work.PROMPT, Work.ROUND, Work.PURSUIT]
    assert (found[2].rows, found[2].branches) == (1, 1)
    assert found[2].began == found[2].glued < found[2].forked < found[2].ended


def test_a_round_that_finds_no_block_ends_without_branches() -> None:
    driver, found = driven(num_blocks=3)
    driver.submit([request(0, 9).admit()])
    driver.work()
    assert [(one.work, one.branches) for one in found] == [(Work.PROMPT, 0), (Work.ROUND, 0)]
