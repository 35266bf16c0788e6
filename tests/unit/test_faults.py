"""Whatever happens to the draft side and to what crosses: texts are the target's, nobody waits, no slot is lost, and
hits come back.

Speculator, restarts and draft side are the real ones; the model, the target, the link (`faulty_channel.py`) and the
clock are not.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from tests.unit.placement.faulty_channel import STEP_FAULTS, TABLE_FAULTS, FaultyChannel, Link
from tests.unit.state_machine.surface import DrivenPolicy, arrival, free_slots, stamps_of, verified
from tests.unit.state_machine.target import Kind, Oracle, Request, WiderTarget
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import GONE, Stamp, Step, Table
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.placement.restarting import Care, RestartingChannel
from vllm_saguaro.placement.sharded import ShardedChannel
from vllm_saguaro.slots import Slots
from vllm_saguaro.speculator import Speculator

K, VOCAB = 3, 8
SHAPE = MailboxShape(slots=4, branches=4, num_speculative_tokens=K, ring_bytes=8192, support=VOCAB)
CARE = Care(look_every=1e6, first_back_off=1.0, longest_back_off=4.0, hang=8.0, longest_hang=8.0)
MAX_LENGTH = 190
RETURN_WITHIN = 90
"""Steps after which every request must have had a hit again, if it has so many left."""


@dataclass(frozen=True)
class Moment:
    """One step of the target, and what goes wrong around it."""

    steps: tuple[str, ...]
    tables: tuple[str, ...]
    forwards: int
    seconds: float
    event: str


EVENTS = ("arrive", "abort", "kill", "freeze", "go on", "cannot start")


def moments(altered: bool) -> st.SearchStrategy[list[Moment]]:
    def faults(kinds: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
        allowed = [kind for kind in kinds if altered or kind != "altered"]
        return st.lists(st.sampled_from(["", "", *allowed]), max_size=4).map(tuple)

    one = st.builds(
        Moment,
        faults(STEP_FAULTS),
        faults(TABLE_FAULTS),
        forwards=st.integers(0, 12),
        seconds=st.sampled_from([0.01, 0.01, 0.01, 0.5, 3.0]),
        event=st.sampled_from([""] * 8 + list(EVENTS)),
    )
    return st.lists(one, min_size=4, max_size=24)


def _model() -> FakeModel:
    return FakeModel(num_blocks=256, max_length=MAX_LENGTH, max_tokens=16, max_rows=16, vocab_size=VOCAB)


class World:
    """Requests of a simulated target, and a draft side that has all the bad luck that there is.

    Where there are two, the second one has none.
    """

    def __init__(self, backup: str, altered: bool, drafts: int = 1) -> None:
        self.altered = altered
        self.link, self._calm_link = Link(), Link()
        self.oracle = Oracle(VOCAB)
        self.fails = False
        self.lives: list[FaultyChannel] = []
        self.lucky: FaultyChannel | None = None
        self.page = CounterPage()
        log = logging.Logger("saguaro-test", logging.CRITICAL)
        self.channel = RestartingChannel(self._start, 10_000, self.page, log, CARE, lambda: self.link.now)
        told: Channel = self.channel
        if drafts > 1:
            self.lucky = FaultyChannel(self._calm_link, _model(), SHAPE)
            told = ShardedChannel([self.channel, self.lucky], SHAPE.slots, log)
        self.speculator = Speculator(told, K, self.page, log, DrivenPolicy(K, backup))
        self.running: dict[str, Request] = {}
        self._targets: dict[str, WiderTarget] = {}
        self._expected: dict[str, list[int]] = {}
        self.reached: Counter[str] = Counter()
        self._born = 0
        for _ in range(3):
            self._arrive()

    def _start(self) -> FaultyChannel:
        self.lives.append(FaultyChannel(self.link, _model(), SHAPE, self.fails))
        return self.lives[-1]

    @property
    def life(self) -> FaultyChannel:
        return self.lives[-1]

    def _arrive(self) -> str:
        name, self._born = f"r{self._born}", self._born + 1
        prompt = [(3 * self._born + 5 * i * i + i) % VOCAB for i in range(4 + 7 * (self._born % 4))]
        kind = Kind.COUPLED if self._born % 3 == 0 else Kind.GREEDY
        request = Request(name, prompt, limit=MAX_LENGTH, chunk=64, kind=kind)
        self.running[name] = request
        self._targets[name], self._expected[name] = WiderTarget(self.oracle, request), list(prompt)
        self.speculator.begin_step([arrival(request)], [])
        return name

    def _end(self, name: str) -> None:
        del self.running[name]
        self.speculator.begin_step([], [name])

    # ---- time passes -------------------------------------------------------------------------------------------

    def live(self, moment: Moment) -> None:
        self.link.steps, self.link.tables = list(moment.steps), list(moment.tables)
        self._happen(moment.event)
        self.link.now += moment.seconds
        self.channel.look()
        self.step()
        self._work(moment.forwards)

    def _work(self, forwards: int) -> None:
        self.life.work(forwards)
        if self.lucky is not None:
            self.lucky.work(1000)

    def _happen(self, event: str) -> None:
        self.reached[event] += 1
        if event == "arrive" and len(self.running) < 6:
            self._arrive()
        elif event == "abort" and len(self.running) > 1:
            self._end(next(iter(self.running)))
        elif event == "kill":
            self.life.alive = False
        elif event == "freeze":
            self.life.frozen = True
        elif event == "go on":
            self.life.frozen = self.fails = False
        elif event == "cannot start":
            self.fails = True

    def step(self) -> dict[str, list[int]]:
        """One pass of the target. The drafts that were handed over, by request."""
        self.link.looks = self._calm_link.looks = 0
        with_the_lucky = self._with_the_lucky()
        rows = []
        self.speculator.begin_step([], [])
        for request in self.running.values():
            drafts = list(request.handed)
            rows.append(verified(request, request.run(self._targets[request.name], drafts), len(drafts)))
        handed = dict(zip(self.running, self.speculator.propose(rows), strict=True))
        for name, drafts in handed.items():
            self._check(self.running[name], drafts)
            self.running[name].handed = drafts
        for request in [r for r in self.running.values() if r.done]:
            self._end(request.name)
        now = self._with_the_lucky()
        for name, stamp in with_the_lucky.items():
            if name in self.running and self._is_drafted_for(self.running[name]):
                self.reached["untroubled"] += 1
                assert name in now, "it goes without drafts for what happens to another draft side"
                assert now[name].generation == stamp.generation, "it is told anew for what happens to another one"
        taken = [stamp.slot for stamp in stamps_of(self.speculator).values()]
        assert sorted(taken + free_slots(self.speculator)) == list(range(SHAPE.slots)), "a slot is lost or doubled"
        return handed

    def _with_the_lucky(self) -> dict[str, Stamp]:
        """The requests that the draft side has to which nothing happens."""
        if self.lucky is None:
            return {}
        return {name: stamp for name, stamp in stamps_of(self.speculator).items() if stamp.slot >= SHAPE.slots // 2}

    @staticmethod
    def _is_drafted_for(request: Request) -> bool:
        """Whether a draft side that has it does not give it up."""
        return len(request.text) < MAX_LENGTH - 2 * K and max(request.text) < VOCAB

    def _check(self, request: Request, drafts: list[int]) -> None:
        assert len(drafts) <= K
        expected = self._expected[request.name]
        while len(expected) < len(request.text):
            expected.append(self._targets[request.name].next_token(expected))
        assert request.text == expected[: len(request.text)], "a request has another text than the target's"
        if self.altered or not drafts:
            return
        text = list(request.text)
        for draft in drafts:
            assert draft == self.oracle.next_draft(request, text), "stale drafts are served"
            text.append(draft)
        self.reached["right drafts"] += 1

    # ---- after the storm ---------------------------------------------------------------------------------------

    def calm(self) -> None:
        """Nothing more goes wrong: what hangs is followed by what does not, and every request has hits again."""
        self.link.steps, self.link.tables = [], []
        self.fails = False
        self.life.let_come()
        for _ in range(16):
            self.link.now += 1.0
            self.step()
            self._work(1000)
            self.channel.look()
        assert self.channel.alive, "no draft side is back"
        while len(self.running) >= SHAPE.slots:  # so that there is a slot for everybody
            self._end(next(iter(self.running)))
        newest = self._arrive()
        short = [r for r in self.running.values() if len(r.text) < MAX_LENGTH - RETURN_WITHIN - K - 1]
        waiting = {r.name for r in short if not self.altered} | {newest}
        for _ in range(RETURN_WITHIN):
            if not waiting:
                break
            self._work(1000)
            waiting -= {name for name, drafts in self.step().items() if drafts}
            # One with a token that the draft does not know cannot be drafted for.
            waiting -= {name for name, request in self.running.items() if max(request.text) >= VOCAB}
        assert not waiting, "hits do not come back"
        self.reached["hits are back"] += 1

    def end(self) -> None:
        for name in list(self.running):
            self._end(name)
        self.speculator.begin_step([], [])
        assert len(free_slots(self.speculator)) == SHAPE.slots, "a slot is lost"
        self._work(1000)
        if not self.link.seen:
            assert len(self.life.loop) == 0
        assert self.lucky is None or len(self.lucky.loop) == 0, "it keeps what has left"
        self.channel.close()
        assert not any(life.alive for life in self.lives)


@dataclass(frozen=True)
class Weather:
    """What may go wrong, and the backup that is asked for meanwhile."""

    altered: bool
    backup: str
    examples: int = 30
    drafts: int = 1


WEATHER = {
    "all but altered": Weather(False, "none"),
    "just in time": Weather(False, "jit", 15),
    "altered": Weather(True, "none"),
    "one of two drafts": Weather(False, "none", drafts=2),
}
MUST_SEE = {
    *("step lost", "step twice", "step late", "step refused", "table hidden", "table stale"),
    *EVENTS,
    "hits are back",
}


def run(name: str, how: settings) -> set[str]:
    """What happened in all runs together."""
    weather, seen = WEATHER[name], set[str]()

    @how
    @seed(7)
    @given(moments(weather.altered))
    def storm(story: list[Moment]) -> None:
        world = World(weather.backup, weather.altered, weather.drafts)
        for moment in story:
            world.live(moment)
        world.calm()
        world.end()
        seen.update(world.link.seen, world.reached)

    storm()
    return seen


def short(examples: int, **more: Any) -> settings:
    return settings(max_examples=examples, deadline=None, database=None, **more)


@pytest.mark.parametrize("name", WEATHER)
def test_whatever_goes_wrong_texts_are_right_nobody_waits_no_slot_is_lost_and_hits_come_back(name: str) -> None:
    seen = run(name, short(WEATHER[name].examples))
    more = {"step altered", "table altered", "frame refused"} if WEATHER[name].altered else {"right drafts"}
    more |= {"ring full", "untroubled"} if WEATHER[name].drafts > 1 else set()
    missing = (MUST_SEE | more) - seen
    assert not missing, f"the runs no longer get as far as: {sorted(missing)}"


# ---- errors that are planted ----------------------------------------------------------------------------------------


def drafts_are_taken_unseen(patch: pytest.MonkeyPatch) -> None:
    verify = SimulatedTarget.verify

    def planted(self: SimulatedTarget, tokens: Sequence[int], drafts: Sequence[int]) -> list[int]:
        return [*drafts, *verify(self, [*tokens, *drafts], [])]

    patch.setattr(SimulatedTarget, "verify", planted)


def a_table_is_taken_whatever_its_round(patch: pytest.MonkeyPatch) -> None:
    look_up, read = Speculator._look_up, FaultyChannel.read
    awaited: dict[int, Any] = {}

    def planted(self: Speculator, row: Any) -> Any:
        awaited.update({stamp.slot: stamp for stamp in stamps_of(self).values()})
        return look_up(self, row)

    def planted_read(self: FaultyChannel, slot: int) -> Table | None:
        table = read(self, slot)
        if table is None or table.stamp.round == GONE:
            return table
        return Table(awaited.get(slot, table.stamp), table.accepted, table.bonus, table.drafts)

    patch.setattr(Speculator, "_look_up", planted)
    patch.setattr(FaultyChannel, "read", planted_read)


def what_was_lost_is_not_said(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DraftLoop, "_say_if_lost", lambda self, entry, stamp: None)


def what_was_given_up_is_not_told_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Speculator, "_may_try", lambda self, request_id: request_id not in self._given_up)


def lives_are_not_told_apart(patch: pytest.MonkeyPatch) -> None:
    """Neither by the target side, nor by what the draft side says of requests that it was never told of."""
    what_was_lost_is_not_said(patch)
    patch.setattr(Slots, "look", lambda self: [])


def a_draft_side_that_ended_stays_away(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RestartingChannel, "_start_again", lambda self: None)


def a_hang_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RestartingChannel, "_hangs", lambda self, present, gap: False)


def slots_are_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "give", lambda self, slot: None)


def a_wait_has_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DrivenPolicy, "patience", lambda self, depth: 3600.0)


def a_step_goes_to_all_draft_sides_at_once(patch: pytest.MonkeyPatch) -> None:
    def planted(self: Speculator, step: Step) -> None:
        self._tell_shard(self._slots.shards[0], step)

    patch.setattr(Speculator, "_post", planted)


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, str]] = {
    drafts_are_taken_unseen: ("altered", "another text"),
    a_table_is_taken_whatever_its_round: ("all but altered", "stale drafts"),
    what_was_lost_is_not_said: ("all but altered", "hits do not come back"),
    what_was_given_up_is_not_told_anew: ("all but altered", "hits do not come back"),
    lives_are_not_told_apart: ("all but altered", "hits do not come back"),
    a_draft_side_that_ended_stays_away: ("all but altered", "no draft side is back"),
    a_hang_is_not_noticed: ("all but altered", "hits do not come back"),
    slots_are_not_given_back: ("all but altered", "a slot is lost"),
    a_wait_has_no_end: ("just in time", "somebody waits"),
    a_step_goes_to_all_draft_sides_at_once: ("one of two drafts", "for what happens to another"),
}
"""Where each of them is found, and as what."""


@pytest.mark.parametrize(("plant", "where"), PLANTED.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_error_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], where: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    name, complaint = where
    with pytest.raises(AssertionError, match=complaint):
        run(name, short(100, phases=[Phase.generate], report_multiple_bugs=False))
