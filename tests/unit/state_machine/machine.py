"""The state machine: requests that come, run and go on the target side, and a draft side that works when it likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.state_machine.draft_side import Sizes
from tests.unit.state_machine.surface import arrival, free_slots, unheard, verified
from tests.unit.state_machine.target import STRANGE, Kind, Oracle, Request, WiderTarget
from tests.unit.state_machine.two_sides import TwoSides

MOST_K = 3
NAMES = ("a", "b", "c", "d")

works = st.lists(st.sampled_from(["", "r", "ra", "raa", "aaa"]), max_size=4)
"""What the draft side does before each of the next calls of the target side."""
forwards = st.sampled_from([0, 1, 2, 3, 4, 5, None])
"""Of the draft side; None: all that there are."""
counts_of_drafts = st.lists(st.sampled_from([MOST_K, MOST_K, MOST_K, 2, 1, 0]), min_size=1, max_size=len(NAMES))


@dataclass(frozen=True)
class Arrival:
    """A request to come. One that still runs under its name has ended then, which is not always `said`."""

    name: str
    length: int
    more: int
    chunk: int
    kind: Kind
    strange: bool
    said: bool


arrivals = st.builds(
    Arrival,
    name=st.sampled_from(NAMES),
    length=st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(13, 30), st.integers(28, 44)),
    more=st.one_of(st.integers(2, 10), st.integers(1, 30)),
    chunk=st.sampled_from([64, 64, 5]),
    kind=st.sampled_from([Kind.GREEDY, Kind.GREEDY, Kind.COUPLED, Kind.SAMPLED]),
    strange=st.sampled_from([False] * 9 + [True]),
    said=st.booleans(),
)


@dataclass(frozen=True)
class World:
    """Where a run takes place, and what it must at least have seen to be worth anything."""

    must_see: tuple[str, ...]
    num_blocks: int = 256
    ring_bytes: int = 8192
    backup: str = "none"
    method: str = "coupled"
    examples: int = 9
    fate: str = "lives"


class SpeculationMachine(RuleBasedStateMachine):
    """Requests of a simulated target that come, run and go, and a draft side that is as fast or slow as it likes."""

    world: ClassVar[World]
    reached: ClassVar[Counter[str]]
    """What happened in all runs of a test together."""

    @initialize(
        steps=st.integers(1, MOST_K),
        branches=st.integers(2, 5),
        slots=st.sampled_from([4, 4, 3, 2]),
        first=st.lists(arrivals, min_size=2, max_size=4),
    )
    def open(self, steps: int, branches: int, slots: int, first: list[Arrival]) -> None:
        world = self.world
        sizes = Sizes(steps, branches, slots, world.num_blocks, world.ring_bytes, world.backup, world.method)
        self.oracle = Oracle(sizes.vocab_size)
        self.running: dict[str, Request] = {}
        self.told: dict[str, Request] = {}
        """The newest request of each name that the speculator has heard of."""
        self.arriving: dict[str, Request] = {}
        self.left: list[str] = []
        self.two = TwoSides(sizes, self.oracle, self.told.__getitem__)
        self.moves = 0
        self.arrive(first)

    # ---- requests that come and go -----------------------------------------------------------------------------

    @rule(arrivals=st.lists(arrivals, min_size=1, max_size=3))
    def arrive(self, arrivals: list[Arrival]) -> None:
        for new in arrivals:
            if new.said and self.running.pop(new.name, None) is not None:
                self.left.append(new.name)
            vocab_size = self.two.sizes.vocab_size
            prompt = [(7 * new.length + 5 * i * i + i) % vocab_size for i in range(new.length)]
            if new.strange:
                prompt[new.length // 2] = vocab_size + new.length % STRANGE
            self.arriving[new.name] = Request(new.name, prompt, new.length + new.more, new.chunk, new.kind)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), how=st.sampled_from(["abort", "preempt or resume", "preempt or resume"]))
    def disturb(self, which: int, how: str) -> None:
        request = list(self.running.values())[which % len(self.running)]
        if how == "abort":
            del self.running[request.name]
            self.left.append(request.name)
        elif request.waiting:
            request.waiting = False
        else:
            self.reached["drafts dropped by preemption"] += bool(request.handed)
            request.preempt()

    # ---- steps of the target -----------------------------------------------------------------------------------

    @rule(works=works)
    def begin_step(self, works: list[str]) -> None:
        """The target has begun a pass: its draft side may work before the outcomes are known."""
        self.two.channel.meanwhile = list(works)
        self._begin_step()

    @precondition(lambda self: self.running or self.arriving)
    @rule(
        works=works,
        skipped=st.sets(st.integers(0, 2), max_size=1),
        kept=counts_of_drafts,
        most=st.sampled_from([None, None, None, 2, 1, 0]),
        coin=st.integers(0, 9),
        rest=st.sampled_from([0] * 8 + [2]),
        otherwise=st.sampled_from(["", "raa"]),
    )
    def step(
        self,
        works: list[str],
        skipped: set[int],
        kept: list[int],
        most: int | None,
        coin: int,
        rest: int,
        otherwise: str,
    ) -> None:
        self.two.policy.rest_next = rest
        self.two.channel.otherwise = otherwise
        self.two.channel.meanwhile = list(works)
        self._step(coin, kept, skipped, most)

    @precondition(lambda self: self.running or self.arriving)
    @rule(
        works=st.lists(st.tuples(forwards, forwards), min_size=1, max_size=5),
        skipped=st.sampled_from([(), (), (0,), (1,)]),
        kept=counts_of_drafts,
        coin=st.integers(0, 9),
    )
    def steps(
        self, works: list[tuple[int | None, int | None]], skipped: tuple[int, ...], kept: list[int], coin: int
    ) -> None:
        """A while in which the draft side hears of every pass as it begins and ends, and does some forwards then."""
        for during, after in works:
            self._begin_step()
            self._work_a_while(during)
            self._step(coin, kept, skipped)
            self._work_a_while(after)

    def _work_a_while(self, forwards: int | None) -> None:
        if self.two.channel.alive and forwards is None:
            self.come_to_rest()
        elif self.two.channel.alive:
            self.work(frames=20, forwards=forwards or 0)

    def _begin_step(self) -> None:
        arriving, self.arriving = self.arriving, {}
        left, self.left = self.left, []
        for name in arriving:
            self.reached["end that was not said"] += name in self.running
            self.reached["end and arrival at once"] += name in left
        self.running |= arriving
        self.told |= arriving
        self.two.speculator.begin_step([arrival(request) for request in arriving.values()], left)

    def _step(
        self, coin: int = 0, kept: Sequence[int] = (MOST_K,), skipped: Collection[int] = (), most: int | None = None
    ) -> None:
        """One pass of the target, `coin` tossed for requests that are not greedy. `kept`: drafts that are scheduled."""
        self._begin_step()
        rows: list[tuple[Request, list[int], int]] = []
        for i, request in enumerate(self.running.values()):
            if not request.waiting and i not in skipped:
                drafts = request.handed[: kept[i % len(kept)]]
                self.reached["fewer drafts scheduled"] += len(drafts) < len(request.handed)
                self._check_proposals(request, drafts)
                target = WiderTarget(self.oracle, request, coin if request.kind is Kind.SAMPLED else 0)
                rows.append((request, request.run(target, drafts), len(drafts)))
        handed = self.two.speculator.propose([verified(*row) for row in rows], most)
        assert len(handed) == len(rows)
        for (request, sampled, _), drafts in zip(rows, handed, strict=True):
            self._check_handed(request, sampled, drafts, most)
            request.handed = drafts
            if request.done:
                self._end(request)

    def _check_handed(self, request: Request, sampled: list[int], drafts: list[int], most: int | None) -> None:
        """Drafts of exactly this text, and no more of them than asked for."""
        steps = self.two.sizes.num_speculative_tokens
        assert len(drafts) <= (steps if most is None else min(most, steps))
        if not sampled:
            assert drafts == []
            self.reached["piece of a prompt"] += 1
        text = list(request.text)
        for draft in drafts if drafts != request.guess(len(drafts)) else []:
            assert self.oracle.next_draft(request, text) in (None, draft), "stale drafts are served"
            assert draft < self.two.sizes.vocab_size
            text.append(draft)
            self.reached[f"right draft, {request.kind}"] += 1

    def _check_proposals(self, request: Request, drafts: list[int]) -> None:
        """The q that the verifier is told is the one that exactly these drafts were drawn from."""
        q = self.two.speculator.proposals(request.name, len(drafts)) if drafts else None
        if q is None:
            return
        assert request.kind is Kind.SAMPLED
        for j, draft in enumerate(drafts):
            expected = self.oracle.q(request, [*request.text, *drafts[:j]]).numpy()
            np.testing.assert_allclose(q.probabilities[j], expected[q.tokens[j]], rtol=1e-4, atol=1e-7)
            assert draft in q.tokens[j]
            self.reached["right q"] += 1

    def _end(self, request: Request) -> None:
        if request.kind is not Kind.SAMPLED:
            made = len(request.text) - len(request.prompt)
            assert request.text[-made:] == WiderTarget(self.oracle, request).greedy_text(request.prompt, made)
        del self.running[request.name]
        self.left.append(request.name)
        self.reached["ended"] += 1

    # ---- the draft side ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.two.channel.alive)
    @rule(frames=st.integers(0, 3), forwards=st.integers(0, 6))
    def work(self, frames: int, forwards: int) -> None:
        for _ in range(frames):
            if not self.two.draft.receive():
                break
            self.two.check()
        for _ in range(forwards):
            if not self.two.draft.loop.advance():
                break
            self.two.check()

    @precondition(lambda self: self.two.channel.alive)
    @rule()
    def come_to_rest(self) -> None:
        self.two.draft.drain()
        self.reached.update(self.two.check_at_rest())

    @precondition(lambda self: self.world.fate == "restarts" and self.moves > 8)
    @rule()
    def restart(self) -> None:
        """Another life of the draft side, which knows nothing: all requests are told to it anew."""
        self.two.restart_draft()
        self.reached["restart"] += 1

    @precondition(lambda self: self.world.fate == "dies" and self.moves > 16 and self.two.channel.alive)
    @rule(calls=st.integers(0, 4))
    def die(self, calls: int) -> None:
        """The draft side ends in the middle of a step, or right after it."""
        self.two.channel.meanwhile = [""] * calls + ["!"]
        self._step()
        self.two.channel.close()
        self.reached["death"] += 1

    # ---- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.moves += 1
        self.two.check()

    def teardown(self) -> None:
        """Every request comes to its end, and with the last of them everything is given back."""
        if not hasattr(self, "two"):
            return
        for request in self.running.values():
            request.waiting = False
        for _ in range(100):
            if not self.running and not self.arriving:
                break
            if self.two.channel.alive:
                self.come_to_rest()
            self._step()
            self.two.check()
        assert not self.running
        for _ in range(3):  # a release may have found no room in the ring
            self._begin_step()
            if self.two.channel.alive:
                self.two.draft.drain()
        assert len(free_slots(self.two.speculator)) == self.two.sizes.slots
        assert not unheard(self.two.speculator)
        if self.two.channel.alive:
            self.two.check()
            assert len(self.two.draft.loop) == 0, "the draft side keeps a request that has left"
            assert self.two.draft.engine.pool.num_free == self.two.sizes.num_blocks
        self.reached.update(self.two.counts())
