"""Several engines at one draft pool: isolation, fairness, coming and going, and what goes wrong with one of them."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.loop_driver import Request
from tests.unit.placement.pooled import (
    SHAPE,
    VOCABULARY,
    Engine,
    K,
    LocalEnd,
    ask,
    make_pool,
    model,
    request,
    serve,
    work,
)
from vllm_saguaro.drafting import loop as loop_module
from vllm_saguaro.drafting.kv import BlockPool, Blocks
from vllm_saguaro.messages import Stamp, Step, Table
from vllm_saguaro.placement.admission import Ask
from vllm_saguaro.placement.channel import NotAdmitted
from vllm_saguaro.placement.mailbox import DraftState, Mailbox
from vllm_saguaro.placement.pool import DraftPool, PoolBroken

LENGTHS = (9, 14, 5)


def engines_with_requests(pool: DraftPool, engines: int) -> tuple[list[Engine], list[list[Request]]]:
    """All use the same slots and generations, as real ones do, for texts of their own."""
    at = [Engine(pool) for _ in range(engines)]
    return at, [[request(e, slot, length) for slot, length in enumerate(LENGTHS)] for e in range(engines)]


# ---- isolation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [2, 3])
def test_every_table_is_of_its_own_engines_text(engines: int) -> None:
    drafted = model()
    serve(model(), *engines_with_requests(make_pool(drafted), engines), rounds=8)


class Swapped(DraftPool):
    """Planted: tables go into the link that came before."""

    def _let_in(self) -> None:
        super()._let_in()
        if len(self._members) > 1:
            first, second = self._members[0], self._members[1]
            second.loop._publish = first.end.mailbox.publish


class OneLoop(DraftPool):
    """Planted: one loop for all, which knows a request by its slot alone."""

    def _let_in(self) -> None:
        super()._let_in()
        for member in self._members:
            member.loop = self._members[0].loop


def own_blocks(of: Any) -> Callable[[Ask, Blocks], Any]:
    """Planted: each engine takes blocks as if it had the model to itself."""
    return lambda asked, blocks: make_engine(of, K, int(asked.options["branches"]), pool=BlockPool(of.num_blocks))


@pytest.mark.parametrize("planted", [Swapped, OneLoop, "own blocks"])
def test_a_planted_confusion_of_engines_is_seen(planted: Any) -> None:
    drafted = model()
    kind = planted if isinstance(planted, type) else DraftPool
    pool = make_pool(drafted, kind=kind, make=own_blocks(drafted) if planted == "own blocks" else None)
    with pytest.raises(AssertionError):
        serve(model(), *engines_with_requests(pool, 2), rounds=8)


def test_nothing_of_one_engine_is_in_the_memory_of_another() -> None:
    pool = make_pool(model())
    busy, idle = Engine(pool), Engine(pool)
    before = bytes(idle.mailbox._buffer)
    serve(model(), [busy], [[request(0, slot, 9) for slot in range(4)]], rounds=4)
    after = bytes(idle.mailbox._buffer)
    assert [i for i in range(len(after)) if after[i] != before[i]] == []


# ---- fairness -------------------------------------------------------------------------------------------------------


class InOrder(DraftPool):
    """Planted: whoever came first goes first as long as there is something to do."""

    def turn(self) -> bool:
        while self._members[0].place.number != 1:
            self._members.rotate(1)
        return super().turn()


def turns_until_table(pool: DraftPool) -> int:
    """Turns from an outcome to its table, for the one request of an engine beside one that has 64 always at work."""
    big, small = Engine(pool, ask("big", slots=64)), Engine(pool, ask("small", slots=1))
    many, one = [request(0, slot, 9) for slot in range(64)], request(1, 0, 9)
    big.post(admits=[r.admit() for r in many])
    small.post(admits=[one.admit()])
    work(pool)
    worst = 0
    for _ in range(4):
        table = small.table_of(one)
        assert table is not None
        small.post(outcomes=[one.outcome(table.accepted[0], table.bonus[0], table.speculation(0))])
        for turn in range(1, 200):
            if all(big.finished(r) for r in many):  # it never has nothing to do
                big.post(outcomes=[r.outcome(0, 1) for r in many])
            pool.turn()
            if small.finished(one):
                worst = max(worst, turn)
                break
        else:
            return 200
    return worst


def test_a_request_beside_an_engine_with_64_waits_for_as_many_forwards_of_that_as_it_has_itself() -> None:
    assert turns_until_table(make_pool(model())) <= 2 * (K + 1)


def test_a_pool_that_serves_the_first_first_is_seen_to_starve_the_other() -> None:
    assert turns_until_table(make_pool(model(), kind=InOrder)) > 2 * (K + 1)


def test_rows_are_shared_so_that_who_needs_few_gets_them() -> None:
    pool = make_pool(model(num_blocks=4096))
    big, small = Engine(pool, ask("big", slots=64, branches=8)), Engine(pool, ask("small", slots=2, branches=8))
    many, few = [request(0, slot, 9) for slot in range(64)], [request(1, slot, 9) for slot in range(2)]
    big.post(admits=[r.admit() for r in many])
    small.post(admits=[r.admit() for r in few])
    work(pool)
    big.post(outcomes=[r.outcome(0, 1) for r in many])  # all of them at once
    small.post(outcomes=[r.outcome(0, 1) for r in few])
    work(pool)
    assert {len(small.check_table(model(), r).bonus) for r in few} == {8}, "all that it may have"
    assert {len(big.check_table(model(), r).bonus) for r in many} == {(256 - 16) // 64}


def test_a_long_prompt_of_one_engine_is_read_in_pieces_between_the_tables_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_module, "PROMPT_PIECE", 8)
    drafted = model()
    pool = make_pool(drafted)
    reading, drafting = Engine(pool), Engine(pool)
    one = request(1, 0, 6)
    drafting.post(admits=[one.admit()])
    work(pool)
    drafted.batches.clear()
    reading.post(admits=[request(0, 0, 80).admit()])
    drafting.post(outcomes=[one.outcome(0, 3)])
    for _ in range(2 * (K + 1)):
        pool.turn()
    assert drafting.finished(one)
    assert max(tokens for rows, tokens in drafted.batches if rows == 1) <= 8
    work(pool)
    assert reading.finished(request(0, 0, 80))


def test_an_engine_alone_reads_a_prompt_in_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "PROMPT_PIECE", 8)
    drafted = model()
    pool = make_pool(drafted)
    reading, _ = Engine(pool), Engine(pool)
    reading.post(admits=[request(0, 0, 80).admit()])
    work(pool)
    assert (1, 80) in drafted.batches


# ---- coming and going -----------------------------------------------------------------------------------------------


def test_one_that_leaves_leaves_nothing_and_the_others_go_on() -> None:
    pool = make_pool(model())
    (leaving, staying), (theirs, own) = engines_with_requests(pool, 2)
    serve(model(), [leaving, staying], [theirs, own], rounds=2)
    pool.turn()  # in the middle of trees of both
    leaving.end.hung_up = True
    work(pool)
    assert leaving.place.ended.is_set()
    assert leaving.place.reason == "it hung up"
    assert leaving.end.closed
    assert len(pool._members) == 1
    for one in own:
        staying.check_table(model(), one)
    staying.post(releases=[one.release() for one in own])
    work(pool)
    assert pool._shares.num_free == pool._shares.num_blocks


def test_one_that_comes_later_or_again_has_a_number_and_a_place_of_its_own() -> None:
    pool = make_pool(model(), engines=2)
    first, second = Engine(pool), Engine(pool)
    with pytest.raises(NotAdmitted, match="room for 2 engines"):
        Engine(pool)
    first.end.hung_up = True
    work(pool)
    third = Engine(pool)
    assert [engine.place.number for engine in (first, second, third)] == [1, 2, 3]
    requests = [[request(e, slot, 9) for slot in range(3)] for e in (1, 2)]
    serve(model(), [second, third], requests, rounds=3)


def test_one_with_other_settings_is_not_let_in() -> None:
    pool = make_pool(model())
    with pytest.raises(NotAdmitted, match="num_speculative_tokens 9 instead of 3") as found:
        pool.admit(ask("b", num_speculative_tokens=9))
    assert found.value.disagrees
    assert not pool._places


def test_requests_count_against_the_rows_until_their_engine_has_left() -> None:
    pool = make_pool(model(max_rows=100))
    first = Engine(pool, ask(slots=60))
    with pytest.raises(NotAdmitted, match="rows for 40 more"):
        pool.admit(ask(slots=41))
    first.end.hung_up = True
    work(pool)
    pool.admit(ask(slots=100))


@pytest.mark.parametrize("how", ["it never brings its link", "what drafts for it cannot be made"])
def test_a_place_that_comes_to_nothing_is_free_again(how: str) -> None:
    def fail(asked: Ask, blocks: Blocks) -> Any:
        raise ValueError("no engine like this")

    pool = make_pool(model(), engines=1, make=fail if how.startswith("what") else None)
    if how.startswith("what"):
        engine = Engine(pool)
        assert engine.place.reason == "no engine like this"
        assert engine.end.closed
    else:
        pool.give_up(pool.admit(ask()), "it did not come")
    assert pool._shares.num_free == pool._shares.num_blocks
    assert len(pool._shares) == 0
    pool.admit(ask())


# ---- what goes wrong with one ---------------------------------------------------------------------------------------


def scribble(engine: Engine, dice: random.Random) -> None:
    """Anything, anywhere in the memory of its link."""
    buffer = engine.mailbox._buffer
    for _ in range(dice.randrange(1, 40)):
        at = dice.choice([dice.randrange(128), len(buffer) - dice.randrange(1, 4096), dice.randrange(len(buffer))])
        buffer[at] = dice.randrange(256)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_one_link_says_the_tables_of_the_others_are_right(seed: int) -> None:
    """Steps that nobody would send, and memory that is scribbled over in any place."""
    dice = random.Random(seed)
    pool = make_pool(model())
    (wild, good), (theirs, own) = engines_with_requests(pool, 2)
    wild.post(admits=[one.admit() for one in theirs])
    good.post(admits=[one.admit() for one in own])
    for round_ in range(30):
        kind = dice.randrange(4)
        if kind == 0:
            scribble(wild, dice)
        elif kind == 1:
            one = dice.choice(theirs)
            told = one.outcome(dice.randrange(K), dice.randrange(VOCABULARY), [dice.randrange(60) for _ in range(2)])
            wild.mailbox.post(Step(outcomes=[told]))
        elif kind == 2:
            stamp = Stamp(dice.randrange(80), dice.randrange(3), dice.randrange(3))
            wild.mailbox.post(Step(admits=[Request(stamp, [dice.randrange(60) for _ in range(20)]).admit()]))
        else:
            wild.mailbox.post(Step(wants=[dice.choice(theirs).want(dice.randrange(K), 3, K)]))
        work(pool)
        if round_ % 3 == 2:
            good.post(outcomes=[follow(good.check_table(model(), one), one) for one in own])
    work(pool)
    for one in own:
        good.check_table(model(), one)
    assert not good.place.ended.is_set()


def follow(table: Table, one: Request) -> Any:
    return one.outcome(table.accepted[0], table.bonus[0], table.speculation(0))


def test_memory_that_is_still_looked_at_when_a_link_ends_is_the_end_of_nothing_else() -> None:
    pool = make_pool(model())
    leaving, staying = Engine(pool), Engine(pool)

    def close() -> None:
        raise BufferError("exported pointers exist")

    leaving.end.close = close  # type: ignore[method-assign]
    leaving.end.hung_up = True
    work(pool)
    assert leaving.place.ended.is_set()
    assert [member.place for member in pool._members] == [staying.place]


class Trouble(LocalEnd):
    """An end of which one call fails."""

    def __init__(self, call: str) -> None:
        super().__init__()
        of = self.mailbox if call in ("publish", "receive") else self

        def fail(*given: Any) -> Any:
            self.failed = True
            raise OSError("a planted failure")

        self.failed = False
        if of is self:
            setattr(self, call, fail)
        else:
            self.mailbox = Wrapped(self.mailbox, call, fail)


class Wrapped:
    """A mailbox of which one call fails."""

    def __init__(self, mailbox: Any, call: str, fail: Callable[..., Any]) -> None:
        self._mailbox = mailbox
        setattr(self, call, fail)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mailbox, name)


@pytest.mark.parametrize("call", ["publish", "receive", "check", "lie_down", "get_up", "close"])
def test_a_link_that_fails_ends_alone(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(model())
    good, own = Engine(pool), request(1, 0, 9)
    monkeypatch.setattr("tests.unit.placement.pooled.LocalEnd", lambda: Trouble(call))
    bad = Engine(pool)
    if call != "receive":
        bad.post(admits=[request(0, 0, 9).admit()])
    good.post(admits=[own.admit()])
    work(pool)
    pool._linger = 0.001  # sleep no longer
    pool._sleep()
    if call == "close":
        bad.end.check = lambda: (_ for _ in ()).throw(ValueError("it ends"))  # type: ignore[method-assign]
    work(pool)
    assert isinstance(bad.end, Trouble)
    assert bad.end.failed
    assert bad.place.ended.is_set()
    good.check_table(model(), own)
    assert [member.place for member in pool._members] == [good.place]
    good.post(releases=[own.release()])
    work(pool)
    assert pool._shares.num_free == pool._shares.num_blocks


def test_a_forward_that_fails_ends_the_engine_that_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = model()
    pool = make_pool(drafted)
    bad, good = Engine(pool), Engine(pool)
    own, forward = request(1, 0, 9), drafted.forward

    def fail(batch: Any) -> Any:
        if 39 in batch.token_ids:
            raise RuntimeError("a planted failure")
        return forward(batch)

    monkeypatch.setattr(drafted, "forward", fail)
    good.post(admits=[Request(own.stamp, [1, 2, 3]).admit()])
    bad.post(admits=[Request(own.stamp, [1, 2, 39]).admit()])
    work(pool)
    assert bad.place.reason == "the draft pool failed for this engine: a planted failure"
    assert not good.place.ended.is_set()
    assert good.finished(Request(own.stamp, [1, 2, 3]))


def test_a_model_that_fails_for_everybody_ends_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = model()
    pool = make_pool(drafted)
    engines = [Engine(pool), Engine(pool), Engine(pool)]

    def fail(batch: Any) -> Any:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(drafted, "forward", fail)
    for number, engine in enumerate(engines):
        engine.post(admits=[request(number, 0, 9).admit()])
    with pytest.raises(PoolBroken, match="the device is lost"):
        pool.run()
    assert all(engine.place.ended.is_set() for engine in engines)
    with pytest.raises(NotAdmitted):
        pool.admit(ask())


@pytest.mark.parametrize("when", ["before it is over", "after it is over"])
def test_who_comes_to_a_pool_that_is_over_is_turned_away(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = model()
    pool = make_pool(drafted)
    engines = [Engine(pool), Engine(pool)]
    place, end = pool.admit(ask()), LocalEnd()

    def fail(batch: Any) -> Any:
        if when.startswith("before") and not pool._newcomers:
            pool.bring(place, end)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(drafted, "forward", fail)
    for number, engine in enumerate(engines):
        engine.post(admits=[request(number, 0, 9).admit()])
    with pytest.raises(PoolBroken):
        pool.run()
    if when.startswith("after"):
        pool.bring(place, end)
    assert place.ended.is_set()
    assert end.closed
    assert end.mailbox.state == DraftState.STARTING, "it never was told that the draft is ready"


# ---- its end --------------------------------------------------------------------------------------------------------


def running(pool: DraftPool) -> threading.Thread:
    thread = threading.Thread(target=pool.run, daemon=True)
    thread.start()
    return thread


def test_it_ends_a_while_after_the_last_engine_has_left() -> None:
    pool = make_pool(model(), linger=0.3)
    thread = running(pool)
    place, end = pool.admit(ask()), LocalEnd()
    time.sleep(0.6)
    assert thread.is_alive(), "somebody is about to come"
    pool.bring(place, end)
    time.sleep(0.9)
    assert thread.is_alive(), "somebody is here"
    end.hung_up = True
    left = time.monotonic()
    assert place.ended.wait(60)
    assert pool.touch(), "not at once"
    thread.join(60)
    assert not thread.is_alive()
    assert time.monotonic() - left > 0.3
    assert not pool.touch()
    with pytest.raises(NotAdmitted, match="ending"):
        pool.admit(ask())


def test_who_is_about_to_come_keeps_it_for_as_long_again() -> None:
    pool = make_pool(model(), linger=0.5)
    thread = running(pool)
    for _ in range(8):
        time.sleep(0.15)
        assert pool.touch()
    assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_it_sleeps_when_there_is_nothing_to_do_and_wakes_for_a_newcomer() -> None:
    pool = make_pool(model())
    thread = running(pool)
    time.sleep(0.3)
    used, looked = time.process_time(), time.monotonic()
    time.sleep(1.0)
    assert time.process_time() - used < 0.5 * (time.monotonic() - looked)
    place, end = pool.admit(ask()), LocalEnd()
    pool.bring(place, end)
    deadline = time.monotonic() + 5
    while not pool.has_begun(place) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.has_begun(place)
    pool._linger = 0.0
    end.hung_up = True
    thread.join(60)
    assert not thread.is_alive()


def test_outcomes_that_ring_no_bell_are_looked_for_as_long_as_there_are_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool(model())
    place, end, one, slept = pool.admit(ask()), LocalEnd(), request(0, 0, 9), list[bool]()
    shape = dataclasses.replace(SHAPE, device_steps=4)
    end.mailbox = Mailbox(memoryview(bytearray(shape.total_bytes)), shape)
    pool.bring(place, end)
    pool._let_in()
    monkeypatch.setattr(pool, "_sleep", lambda: slept.append(True))
    long_ago = time.perf_counter() - 10
    pool._rest(long_ago)
    assert len(slept) == 1, "nobody is there"
    end.mailbox.post(Step(admits=[one.admit()]))
    work(pool)
    pool._rest(long_ago)
    assert len(slept) == 1
    end.mailbox.post(Step(releases=[one.release()]))
    work(pool)
    pool._rest(long_ago)
    assert len(slept) == 2


def test_a_table_that_rests_is_gone_on_with_though_no_bell_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, slept = make_pool(model()), list[bool]()
    engine, other = Engine(pool), Engine(pool)
    one, two = request(0, 0, 9), request(1, 0, 9)
    engine.post(admits=[one.admit()])
    other.post(admits=[two.admit()])
    work(pool)
    (loop,) = [member.loop for member in pool._members if member.place is engine.place]
    monkeypatch.setattr(loop.engine.pace, "too_late", lambda *_: True)
    monkeypatch.setattr(pool, "_sleep", lambda: slept.append(True))
    for end, of in ((engine, one), (other, two)):
        table = end.table_of(of)
        assert table is not None
        end.post(outcomes=[of.outcome(table.accepted[0], table.bonus[0], table.speculation(0))])
    work(pool)
    table = engine.table_of(one)
    assert table is not None
    assert len(table.drafts) == 1
    assert other.finished(two), "the rest of one is no rest of another"
    pool._rest(time.perf_counter() - 10)
    assert not slept
    monkeypatch.setattr(loop.engine.pace, "too_late", lambda *_: False)
    pool._rest(time.perf_counter() - 10)
    assert not slept, "its rest was over just after it was asked"
    work(pool)
    assert engine.finished(one)
    pool._rest(time.perf_counter() - 10)
    assert len(slept) == 1


def test_what_it_drops_is_told_seldom(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    pool = make_pool(model())
    engine = Engine(pool)
    for _ in range(20):
        engine.mailbox._drop()
        pool.turn()
    assert [record.args for record in caplog.records] == [(1, 1), (1, 3), (1, 7), (1, 15)]


def test_members_are_in_a_row_whose_first_is_the_next() -> None:
    pool = make_pool(model())
    engines = [Engine(pool) for _ in range(3)]
    for number, engine in enumerate(engines):
        engine.post(admits=[request(number, 0, 9).admit()])
    pool.turn()
    assert [member.place.number for member in pool._members] == [2, 3, 1]
