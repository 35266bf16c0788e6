from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.drafting.checks import COUPLED, GREEDY, SAMPLED, SEEDED, make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.loop_driver import LoopDriver, Request, request
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro.drafting import loop as loop_module
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.drafting.pace import Pace
from vllm_saguaro.messages import Outcome, Release, Sampling, Stamp, Step, Table

K = 3


def started(*requests: Request, model: FakeModel | None = None, branches: int = 4) -> LoopDriver:
    driver = LoopDriver(model or FakeModel(num_blocks=256), K, branches)
    driver.submit([r.admit() for r in requests])
    driver.work()
    return driver


def hit(driver: LoopDriver, r: Request, branch: int = 0) -> Outcome:
    table = driver.check_table(r)
    return r.outcome(table.accepted[branch], table.bonus[branch], table.speculation(branch))


# ---- C --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sampling", "c"),
    [
        ("probabilistic", SAMPLED, 0.3),
        ("probabilistic", GREEDY, None),
        ("coupled", COUPLED, None),
        ("greedy", SAMPLED, None),
    ],
)
def test_tables_tell_the_c_that_was_chosen_where_drafts_are_drawn(
    method: str, sampling: Sampling, c: float | None
) -> None:
    told: list[Table] = []
    engine = make_engine(FakeModel(num_blocks=256), K, 4, method=method, deflations=Deflations(K, 0.3))
    loop = DraftLoop(engine, told.append)
    loop.submit(Step(admits=[request(0, 9, sampling=sampling).admit()]))
    while loop.advance():
        pass
    assert len(told) == K + 1
    assert {table.sampling_c for table in told} == {c}


# ---- one request ----------------------------------------------------------------------------------------------------


def test_depth_grows_from_nothing_to_k_under_one_stamp() -> None:
    r = request(2, 9)
    driver = started(r)
    assert driver.history == [(Stamp(2, 1, 0), depth) for depth in range(K + 1)]
    assert driver.check_table(r).seconds > 0


def test_with_nothing_to_do_the_loop_says_so() -> None:
    driver = LoopDriver(FakeModel())
    assert not driver.loop.advance()
    r = request(0, 9)
    driver.submit([r.admit()])
    assert driver.work() > 0
    assert not driver.loop.advance()


def test_each_outcome_begins_the_next_round() -> None:
    r = request(0, 9)
    driver = started(r)
    for _ in range(4):
        driver.submit(outcomes=[hit(driver, r)])
        driver.work()
        assert len(driver.check_table(r).drafts) == K


def test_a_hit_costs_one_glue_forward_and_k_steps() -> None:
    r = request(0, 9)
    driver = started(r)
    driver.model.batches.clear()
    driver.submit(outcomes=[hit(driver, r)])
    driver.work()
    assert driver.model.batches == [(1, 1)] + [(4, 4)] * K


def test_an_outcome_in_the_middle_of_a_tree_abandons_it() -> None:
    r = request(0, 9)
    driver = LoopDriver(FakeModel(num_blocks=256))
    driver.submit([r.admit()])
    driver.work(most=4)
    table = driver.check_table(r)
    assert 0 < len(table.drafts) < K
    driver.history.clear()
    driver.submit(outcomes=[hit(driver, r, branch=1)])  # partial adoption
    assert len(r.drafts) == len(table.drafts)
    driver.loop.advance()
    assert driver.history == [(r.stamp, 0)]  # the new round at once, not another step of the old tree
    assert driver.model.batches[-1] == (1, 1)
    assert len(driver.check_table(r).bonus) == 4
    driver.work()
    assert len(driver.check_table(r).drafts) == K


def test_an_outcome_before_any_table_is_a_miss_that_recovers() -> None:
    r = request(0, 9)
    driver = LoopDriver(FakeModel(num_blocks=256))
    driver.submit([r.admit()])
    for bonus in (5, 6, 7):
        driver.submit(outcomes=[r.outcome(0, bonus)])
    driver.work()
    assert {stamp.round for stamp, _ in driver.history} == {3}
    driver.check_table(r)


def test_drafts_from_elsewhere_are_followed() -> None:
    r = request(0, 9)
    driver = started(r)
    driver.submit(outcomes=[r.outcome(0, driver.check_table(r).bonus[0], [1, 2, 3])])
    driver.work()
    driver.check_table(r)
    driver.submit(outcomes=[r.outcome(2, 30, [4, 5, 6])])
    driver.work()
    driver.check_table(r)


# ---- what must be ignored -------------------------------------------------------------------------------------------


def test_a_release_of_an_unknown_slot_is_ignored() -> None:
    r = request(0, 9)
    driver = started(r)
    driver.submit(releases=[Release(Stamp(6, 1, 0))])
    assert len(driver.loop) == 1
    driver.work()
    driver.check_table(r)


@pytest.mark.parametrize("stamp", [Stamp(0, 2, 0), Stamp(0, 1, 7)])
def test_what_is_said_of_a_round_or_generation_before_is_ignored(stamp: Stamp) -> None:
    r = request(0, 9, generation=2)
    driver = started(r)
    driver.submit(outcomes=[hit(driver, r)])
    driver.work()
    driver.submit(outcomes=[Outcome(stamp, 0, 3, 10, (), 0)])
    driver.work()
    driver.check_table(r)
    driver.submit(outcomes=[hit(driver, r)])
    driver.work()
    driver.check_table(r)


@pytest.mark.parametrize("stamp", [Stamp(0, 1, 1), Stamp(0, 1, 5), Stamp(0, 2, 0), Stamp(0, 2, 4), Stamp(3, 1, 0)])
def test_where_something_was_not_heard_it_says_that_it_does_not_have_the_request(stamp: Stamp) -> None:
    """An admission or an outcome before this one was lost on the way: to be told anew is the only remedy."""
    r, other = request(0, 9), request(1, 9)
    driver = started(r, other)
    driver.submit(outcomes=[Outcome(stamp, 0, 3, 10, (), 0), hit(driver, other)])
    driver.work()
    assert driver.tables[stamp.slot].stamp == stamp.gone()
    driver.check_table(other)
    told_anew = request(stamp.slot, 10, generation=3)
    driver.submit([told_anew.admit()])
    driver.work()
    driver.check_table(told_anew)
    driver.submit(releases=[other.release(), told_anew.release()] + ([r.release()] if stamp.slot else []))
    driver.work()
    assert driver.engine.pool.num_free == 256


@pytest.mark.parametrize(("accepted", "length"), [(0, 11), (0, 9), (1, 11)])
def test_a_request_whose_text_disagrees_is_dropped_with_its_blocks(accepted: int, length: int) -> None:
    r, other = request(0, 9), request(1, 6)
    driver = started(r, other)
    driver.submit(outcomes=[Outcome(r.stamp, accepted, 3, length, (), 0), hit(driver, other)])
    assert len(driver.loop) == 1
    driver.work()
    driver.check_table(other)
    driver.submit(releases=[other.release()])
    driver.work()
    assert driver.engine.pool.num_free == 256


def test_a_prompt_that_is_too_long_is_ignored_and_its_neighbour_served() -> None:
    long, short = request(0, 65), request(1, 6)
    driver = started(long, short)
    assert len(driver.loop) == 1
    assert driver.table_of(long) is None
    driver.check_table(short)


def test_a_request_that_grows_too_long_is_dropped() -> None:
    r = request(0, 14)
    driver = started(r, model=FakeModel(max_length=16))
    driver.submit(outcomes=[r.outcome(0, 1, [2, 3])])
    driver.work()
    assert len(driver.loop) == 0
    assert driver.engine.pool.num_free == 64


# ---- requests that come and go --------------------------------------------------------------------------------------


def test_a_slot_used_again_serves_the_new_request() -> None:
    first, second = request(0, 9), request(0, 6, generation=2)
    driver = started(first)
    driver.submit([second.admit()], releases=[first.release()])  # the release is of the old generation
    driver.work()
    assert len(driver.loop) == 1
    assert driver.check_table(second).stamp.generation == 2
    driver.submit(releases=[second.release()])
    driver.work()
    assert driver.engine.pool.num_free == 256


def test_after_a_release_nothing_is_published_for_that_request() -> None:
    leaving, staying = request(0, 9), request(1, 9)
    driver = LoopDriver(FakeModel(num_blocks=256))
    driver.submit([leaving.admit(), staying.admit()])
    driver.work(most=4)
    driver.submit(releases=[leaving.release()])
    driver.history.clear()
    driver.work()
    assert {stamp.slot for stamp, _ in driver.history} == {1}
    assert len(driver.check_table(staying).drafts) == K


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_blocks_released_in_the_middle_of_a_tree_are_not_given_to_a_newcomer_too_soon(turns: int) -> None:
    leaving, staying, coming = request(0, 8), request(1, 8), request(2, 9)
    # Room for two requests of 2 blocks with 4 branches of one block each, and no more: the newcomer needs old blocks.
    driver = LoopDriver(FakeModel(num_blocks=12))
    driver.submit([leaving.admit(), staying.admit()])
    driver.work(most=turns)
    assert driver.loop._tree is not None
    free = driver.engine.pool.num_free
    driver.submit([coming.admit()], releases=[leaving.release()])
    while driver.loop._tree is not None:
        assert driver.engine.pool.num_free == free  # still being written
        driver.loop.advance()
    driver.work()
    assert len(driver.check_table(staying).drafts) == K
    assert len(driver.check_table(coming).drafts) == K  # a foreign token in its KV would have changed these
    driver.submit(releases=[staying.release(), coming.release()])
    driver.work()
    assert driver.engine.pool.num_free == 12


def test_an_outcome_and_a_release_in_one_step_give_back_everything() -> None:
    r = request(0, 9)
    driver = started(r)
    driver.submit(outcomes=[hit(driver, r)], releases=[r.release()])
    driver.work()
    assert len(driver.loop) == 0
    assert driver.engine.pool.num_free == 256


def test_a_departure_with_nothing_else_to_do_gives_back_its_blocks() -> None:
    r = request(0, 9)
    driver = started(r)
    driver.submit(releases=[r.release()])
    driver.loop.advance()
    assert driver.engine.pool.num_free == 256


# ---- what would come too late ---------------------------------------------------------------------------------------


class Clockwork(Pace):
    """A pace for which every step comes too late, or none; it notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(K, 4, chooses=False)
        self.late = True
        self.asked: list[tuple[int, float, float]] = []

    def too_late(self, rows: int, tokens: float, elapsed: float) -> bool:
        self.asked.append((rows, tokens, elapsed))
        return self.late


def clockwork(*requests: Request) -> tuple[LoopDriver, Clockwork]:
    model, pace = FakeModel(num_blocks=256), Clockwork()
    driver = LoopDriver(model, engine=make_engine(model, K, 4, pace=pace))
    driver.submit([r.admit() for r in requests])
    while driver.loop.advance():
        assert not driver.loop.rests, "a first round is for an outcome of which nothing is known"
    assert not pace.asked
    return driver, pace


def test_a_table_rests_where_its_next_depth_would_come_too_late_but_not_before_its_first() -> None:
    r, other = request(0, 4), request(1, 3)
    driver, pace = clockwork(r, other)
    driver.submit(outcomes=[hit(driver, r), other.outcome(0, 1)])
    assert not driver.loop.rests
    driver.loop.advance()
    assert (len(driver.check_table(r).drafts), driver.loop.rests) == (0, False)
    driver.loop.advance()
    assert (len(driver.check_table(r).drafts), driver.loop.rests) == (1, True)
    rows, tokens, elapsed = pace.asked[-1]
    assert (rows, tokens) == (8, 1 + K / 2), "K drafts of one request are in the pass, none of the other"
    assert 0 < elapsed < 60
    pace.late = False
    assert not driver.loop.rests
    driver.work()
    assert len(driver.check_table(r).drafts) == len(driver.check_table(other).drafts) == K


def test_an_outcome_ends_the_rest() -> None:
    r = request(0, 9)
    driver, _ = clockwork(r)
    for _ in range(3):
        driver.submit(outcomes=[hit(driver, r)])
        assert not driver.loop.rests
        driver.work(most=2)
        assert driver.loop.rests
        assert len(driver.check_table(r).drafts) == 1


def test_what_the_target_waits_for_does_not_rest() -> None:
    r = request(0, 9)
    driver, _ = clockwork(r)
    driver.submit(outcomes=[hit(driver, r)])
    driver.work(most=2)
    assert driver.loop.rests
    table = driver.check_table(r)
    driver.submit(wants=[r.want(table.accepted[0], table.bonus[0], K)])
    for depth in range(2, K + 1):
        assert not driver.loop.rests
        driver.loop.advance()
        assert len(driver.check_table(r).drafts) == depth


def test_a_tree_behind_which_a_text_waits_does_not_rest() -> None:
    r, coming = request(0, 9), request(1, 40)
    driver, _ = clockwork(r)
    driver.submit(outcomes=[hit(driver, r)])
    driver.work(most=2)
    assert driver.loop.rests
    driver.submit([coming.admit()])
    assert not driver.loop.rests
    driver.work()
    assert len(driver.check_table(r).drafts) == len(driver.check_table(coming).drafts) == K


def test_a_rest_is_no_part_of_the_time_that_a_round_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    r, now = request(0, 9), [100.0]
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    driver, pace = clockwork(r)
    driver.submit(outcomes=[hit(driver, r)])
    driver.work(most=2)
    now[0] += 1
    assert driver.loop.rests
    now[0] += 5
    assert driver.loop.rests
    pace.late = False
    assert not driver.loop.rests
    now[0] += 2
    driver.work()
    assert driver.check_table(r).seconds == pytest.approx(1.0)
    pace.late = True
    for _ in range(2):  # the second one comes while the tree of the first rests
        driver.submit(outcomes=[hit(driver, r)])
        now[0] += 3
        driver.work(most=2)
        assert driver.check_table(r).seconds == pytest.approx(3.0)
        assert driver.loop.rests
        now[0] += 7


@pytest.mark.parametrize("leaves", [0, 1])
def test_where_one_of_two_leaves_the_rest_is_for_the_other(leaves: int) -> None:
    requests = request(0, 4), request(1, 3)
    driver, pace = clockwork(*requests)
    driver.submit(outcomes=[hit(driver, r) for r in requests])
    driver.work(most=2)
    driver.submit(releases=[requests[leaves].release()])
    assert driver.loop.rests
    pace.late = False
    driver.work()
    assert len(driver.check_table(requests[1 - leaves]).drafts) == K


# ---- several requests -----------------------------------------------------------------------------------------------


def test_a_long_prompt_and_a_decoding_request_take_turns() -> None:
    decoding, coming = request(0, 9), request(1, 60)
    driver = started(decoding, model=FakeModel(num_blocks=256, max_tokens=8))
    driver.submit([coming.admit()])
    target = SimulatedTarget(driver.model)
    for _ in range(12):  # 8 chunks of 8 tokens: one or more between any two rounds of the other
        outcome, _ = driver.verify(decoding, target)
        driver.submit(outcomes=[outcome])
        while driver.table_of(decoding) is None or len(driver.check_table(decoding).drafts) < K:
            assert driver.loop.advance()
    assert driver.table_of(coming) is not None, "the prompt starved"
    chunks = [i for i, (rows, tokens) in enumerate(driver.model.batches) if (rows, tokens) == (1, 8)]
    gaps = [after - before for before, after in pairwise(chunks)]
    assert max(gaps) <= 2 + K  # glue and K steps of the other between two chunks


def test_prompts_do_not_hold_up_a_round_by_more_than_one_chunk() -> None:
    decoding = request(0, 9)
    driver = started(decoding, model=FakeModel(num_blocks=256, max_tokens=8))
    driver.submit([request(slot, 60).admit() for slot in (1, 2, 3)])
    driver.work(most=3)
    for _ in range(4):
        driver.submit(outcomes=[hit(driver, decoding)])
        driver.work(most=2)  # perhaps a chunk, then glue and fork
        assert driver.table_of(decoding) is not None
        driver.work(most=K)


@pytest.mark.parametrize(("rows", "count", "share"), [(8, 2, 4), (8, 4, 2), (8, 5, 1), (8, 12, 1), (100, 3, 4)])
def test_with_many_requests_each_gets_fewer_branches(
    rows: int, count: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "MAX_ROWS_A_TREE", rows)
    requests = [request(slot, 3) for slot in range(count)]
    driver = started(*requests)
    for r in requests:
        assert len(driver.check_table(r).bonus) == share


def test_one_forward_of_many_small_requests_stays_within_the_models_tokens() -> None:
    """`DraftModel.max_tokens` bounds one forward, however many requests lack a few tokens at once."""
    requests = [request(slot, K + 1) for slot in range(6)]
    started(*requests, model=FakeModel(num_blocks=256, max_tokens=16))


def test_one_tree_stays_within_the_models_rows() -> None:
    """`DraftModel.max_rows` bounds one forward, whatever MAX_ROWS_A_TREE allows."""
    requests = [request(slot, 3) for slot in range(3)]
    started(*requests, model=FakeModel(num_blocks=256, max_rows=8))


def test_an_empty_prompt_does_not_end_the_draft_side() -> None:
    """A decoder that trusts nothing lets it through, so the loop must bear it."""
    empty, other = request(0, 0), request(1, 9)
    driver = started(empty, other)
    driver.check_table(other)


def test_another_requests_outcome_does_not_leave_a_newcomer_without_a_table() -> None:
    """While the target reads a newcomer's prompt others have outcomes; the newcomer's first is looked up as well."""
    decoding, coming = request(0, 9), request(1, 9)
    driver = started(decoding)
    driver.submit([coming.admit()])
    driver.work(most=2)
    assert driver.check_table(coming).drafts == []  # forked, not grown yet
    driver.submit(outcomes=[hit(driver, decoding)])
    driver.work()
    assert len(driver.check_table(coming).drafts) == K


# ---- whole runs -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_whatever_the_timing_every_table_is_right_and_no_block_is_lost(data: st.DataObject) -> None:
    num_blocks = data.draw(st.sampled_from([24, 48, 256]))
    driver = LoopDriver(FakeModel(num_blocks=num_blocks, max_tokens=64, max_length=96), K, branches=3)
    target = SimulatedTarget(driver.model)
    running: dict[int, Request] = {}
    generations = [0] * 3
    for _ in range(14):
        admits, outcomes, releases = [], [], []
        for slot in range(3):
            if slot not in running and data.draw(st.booleans()):
                generations[slot] += 1
                sampling = data.draw(st.sampled_from([GREEDY, SAMPLED, COUPLED, SEEDED]))
                running[slot] = request(slot, data.draw(st.integers(1, 30)), generations[slot], sampling)
                admits.append(running[slot].admit())
            elif slot in running and data.draw(st.integers(0, 9)) == 0:
                releases.append(running.pop(slot).release())
            elif slot in running:
                outcomes.append(driver.verify(running[slot], target)[0])
        driver.submit(admits, outcomes, releases)
        driver.work(most=data.draw(st.integers(0, 8)))
        for r in running.values():
            if driver.table_of(r) is not None:
                driver.check_table(r)
    driver.submit(releases=[r.release() for r in running.values()])
    driver.work()
    assert len(driver.loop) == 0
    assert driver.engine.pool.num_free == num_blocks


# ---- many texts to read at once, as after a restart -----------------------------------------------------------------


def forwards_until_table(driver: LoopDriver, of: Request, others: Sequence[Request]) -> int:
    """Forwards until this request has its first table, while those of the others that have one go on as it comes."""
    target = SimulatedTarget(driver.model)
    for done in range(500):
        if driver.table_of(of) is not None:
            return done
        finished = [r for r in others if (table := driver.table_of(r)) is not None and len(table.drafts) == K]
        driver.submit(outcomes=[driver.verify(r, target)[0] for r in finished])
        driver.loop.advance()
    raise AssertionError("it starves")


def test_a_short_newcomer_is_not_kept_waiting_by_long_texts_that_were_told_before() -> None:
    long, short = [request(slot, 61) for slot in range(6)], request(6, 12)
    driver = LoopDriver(FakeModel(num_blocks=512, max_tokens=8))
    driver.submit([r.admit() for r in long])
    driver.work(most=3)
    driver.submit([short.admit()])
    assert forwards_until_table(driver, short, long) <= 5  # two pieces of its own, two of another, its fork


def test_a_long_text_is_read_although_short_ones_never_cease_to_come() -> None:
    long = request(0, 61)
    driver = LoopDriver(FakeModel(num_blocks=512, max_tokens=8))
    driver.submit([long.admit()])
    for generation in range(1, 100):
        if driver.table_of(long) is not None:
            break
        short = request(1 + generation % 3, 20, generation)
        driver.submit([short.admit()])
        driver.work(most=2)  # too few for the newest one: there is always a shorter rest
    assert generation <= 20
    driver.check_table(long)


def test_outcomes_of_running_requests_that_are_read_anew_do_not_put_them_behind() -> None:
    """Each outcome makes a request younger, if one looks at the newest word of it."""
    running = request(0, 40)
    driver = LoopDriver(FakeModel(num_blocks=512, max_tokens=8))
    driver.submit([running.admit()])
    for generation in range(1, 60):
        if driver.table_of(running) is not None:
            break
        driver.submit([request(1 + generation % 3, 20, generation).admit()], [running.outcome(0, generation % 40)])
        driver.work(most=2)
    assert generation <= 30
    driver.check_table(running)
