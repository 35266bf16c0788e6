"""Engines at a draft pool, in one thread and without any transport but a mailbox: the test says whose turn it is."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence
from typing import Any

from tests.unit.drafting.checks import GREEDY, continuation, make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.loop_driver import Request
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.kv import Blocks
from vllm_saguaro.drafting.pace import Pace
from vllm_saguaro.messages import Stamp, Step, Table
from vllm_saguaro.placement.admission import Ask
from vllm_saguaro.placement.draft_end import TargetGone
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape
from vllm_saguaro.placement.pool import DraftPool, Place

K = 3
VOCABULARY = 40
SHAPE = MailboxShape(
    slots=80, branches=8, num_speculative_tokens=K, ring_bytes=1 << 18, support=64, vocab_size=VOCABULARY
)
LOG = logging.getLogger("saguaro-test")


def model(**sizes: int) -> FakeModel:
    return FakeModel(**{"num_blocks": 1024, "max_length": 128, "vocab_size": VOCABULARY, **sizes})


def ask(name: str = "a", slots: int = 4, branches: int = 4, **others: Any) -> Ask:
    """What an engine of these tests asks for. `others` are those of `load_engine`, `max_length` one of the model."""
    drafted = {"model": "small", "vocab_size": VOCABULARY, "max_length": others.pop("max_length", 128)}
    options = {
        "model": drafted,
        "branches": branches,
        "num_speculative_tokens": K,
        "draft_sample_method": "coupled",
        **others,
    }
    return Ask(name, options, slots)


class Unhurried(Pace):
    """Where turns are counted and time does not matter: nothing comes too late."""

    def too_late(self, rows: int, tokens: float, elapsed: float) -> bool:
        return False


class LocalEnd:
    """The draft side's end of a link that is nothing but a mailbox."""

    def __init__(self) -> None:
        self.mailbox: Any = Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.hung_up = self.closed = False

    def idle(self, since: float, may_sleep: bool = True) -> None:
        self.check()

    def check(self) -> None:
        if self.hung_up:
            raise TargetGone("it hung up")

    def lie_down(self) -> tuple[int, int] | None:
        self.check()
        return None if self.mailbox.has_step else (self.bell, select.POLLIN)

    def get_up(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        os.close(self.bell)


class Engine:
    """The target side of one engine."""

    def __init__(self, pool: DraftPool, asked: Ask | None = None) -> None:
        self.pool = pool
        self.end = LocalEnd()
        self.place: Place = pool.admit(asked or ask())
        self.mailbox: Mailbox = self.end.mailbox
        pool.bring(self.place, self.end)
        pool._let_in()

    def post(self, **told: Any) -> None:
        assert self.mailbox.post(Step(**told))

    def table_of(self, request: Request) -> Table | None:
        """The table of the round that this request is in."""
        table = self.mailbox.read(request.stamp.slot)
        return table if table is not None and table.stamp == request.stamp and table.bonus else None

    def finished(self, request: Request) -> bool:
        table = self.table_of(request)
        return table is not None and len(table.drafts) == K

    def check_table(self, oracle: FakeModel, request: Request) -> Table:
        """The whole table is there, and each branch is the oracle's continuation of this very text."""
        table = self.table_of(request)
        assert table is not None
        assert len(table.drafts) == K
        for i, (accepted, bonus) in enumerate(zip(table.accepted, table.bonus, strict=True)):
            text = [*request.tokens, *request.drafts[:accepted], bonus]
            assert list(table.speculation(i)) == continuation(oracle, GREEDY, text, K)
        return table


def request(engine: int, slot: int, length: int) -> Request:
    """A request whose text no other engine has, in a slot and under a stamp that all have."""
    return Request(Stamp(slot, 1, 0), [(13 * engine + 11 * slot + 7 * i) % VOCABULARY for i in range(length)])


def make_pool(
    of: FakeModel,
    engines: int = 4,
    linger: float = 60.0,
    kind: type[DraftPool] = DraftPool,
    make: Callable[[Ask, Blocks], DraftEngine] | None = None,
) -> DraftPool:
    def engine_of(asked: Ask, blocks: Blocks) -> DraftEngine:
        branches = int(asked.options["branches"])
        return make_engine(of, K, branches, pool=blocks, pace=Unhurried(K, branches, chooses=False))

    return kind(of, make or engine_of, ask("first"), engines, LOG, linger)


def work(pool: DraftPool, most: int = 5000) -> int:
    """Turns until there is nothing to do."""
    for done in range(most):
        if not pool.turn():
            return done
    raise AssertionError("there is always something to do")


def serve(oracle: FakeModel, engines: Sequence[Engine], requests: Sequence[Sequence[Request]], rounds: int) -> None:
    """Rounds of all requests of all engines, each engine in its own time, every table checked against the oracle."""
    for engine, own in zip(engines, requests, strict=True):
        engine.post(admits=[one.admit() for one in own])
    pool = engines[0].pool
    for round_ in range(rounds):
        work(pool)
        for number, (engine, own) in enumerate(zip(engines, requests, strict=True)):
            outcomes = []
            for one in own:
                table = engine.check_table(oracle, one)
                branch = (round_ + number) % len(table.bonus)
                hit = (round_ + one.stamp.slot) % 3 > 0
                drafts = table.speculation(branch) if hit else ()
                bonus = table.bonus[branch] if hit else (table.bonus[0] + 1) % VOCABULARY
                outcomes.append(one.outcome(table.accepted[branch] if hit else 0, bonus, drafts))
            engine.post(outcomes=outcomes)
            if round_ % 2:  # the others' outcomes come in the middle of this one's trees
                pool.turn()
                pool.turn()
