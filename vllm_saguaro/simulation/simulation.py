"""The event model: a target, its drafts and the messages between them, request by request, round by round.

Outcomes are drawn: whether one was predicted, and how many drafts are accepted. Everything else follows from the times
in the `World`. Reading prompts is not modelled: a request is there with its first table.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from math import exp, log

import numpy as np

from vllm_saguaro.algorithm.timing import SLACK, DraftTimes, best_branches, drafts_worth_verifying
from vllm_saguaro.drafting.pace import CHOICES
from vllm_saguaro.simulation.draft_side import DraftSide
from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.result import Result
from vllm_saguaro.simulation.world import World, WorldError

_AUTO_MOST = 48
"""N at most where it chooses itself: `config.AUTO_MAX_BRANCHES`."""

_SHORTEST = 1e-9
"""Seconds of a pass, at least, where drafts are weighed against it."""


def simulate(world: World, plan: Plan) -> Result:
    """Run it to the end. Raises WorldError if acceptance is not known for K drafts, or a pass takes no time."""
    return Simulation(world, plan).run()


def branches_that_pay(world: World, plan: Plan) -> int:
    """N by the rule of the draft side (`timing.best_branches`), from the times of a world instead of measured ones."""
    each = -(-plan.batch // plan.drafts)
    base, slope = world.draft_pass.line(each, each * _AUTO_MOST)
    rate = world.hits.at(_AUTO_MOST)
    available = time_to_draft(world, plan.batch * (1 + rate * plan.k))
    most = min(_AUTO_MOST, plan.most_rows // each) if plan.most_rows else _AUTO_MOST
    times = DraftTimes(world.fork + world.draft_pass.at(each), max(0.0, base), max(0.0, slope))
    choices = [n for n in CHOICES if n <= most] or [1]
    return best_branches(times, available, each, plan.k, world.reach[: plan.k], world.hits.at, choices)


def time_to_draft(world: World, tokens: float) -> float:
    """Seconds between outcomes that a draft of ours plans with, where the target's pass is over so many tokens."""
    return SLACK * world.target_pass.at(tokens) - 2 * world.latency


class Simulation:
    """One run. Rows are the places of the batch; a request has one until it ends."""

    def __init__(self, world: World, plan: Plan) -> None:
        if plan.engine != "plain" and plan.k > world.longest:
            raise WorldError(f"acceptance is known for {world.longest} drafts, k is {plan.k}: write a smaller k")
        if world.target_pass.at(1) <= 0:
            raise WorldError("a pass of the target must take some time")
        self._world, self._plan = world, plan
        self._random = np.random.default_rng(plan.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now, self._ended = 0.0, False
        branches = 0
        if plan.engine in ("ssd", "ours"):
            branches = plan.branches or branches_that_pay(world, plan)
        self._result = Result(plan.engine, 0 if plan.engine == "plain" else plan.k, branches)
        rows = min(plan.batch, plan.requests)
        self._remaining = np.zeros(rows, np.int64)
        self._started = np.zeros(rows)
        self._waiting = plan.requests
        self._side = np.arange(rows) % plan.drafts
        self._fresh = np.ones(rows, bool)
        self._drafts = np.zeros(rows, np.int64)
        self._reach = np.zeros((rows, max(1, plan.k)))
        self._round = 0
        self._depth = np.zeros(plan.drafts, np.int64)
        self._sides = [DraftSide(world, plan.k, self._clock, self._after, self._published) for _ in range(plan.drafts)]
        self._asked: dict[int, tuple[int, int]] = {}
        self._replies_due = 0
        self._outcomes_at = 0.0
        self._caps: dict[int, int] = {}
        self._rates: dict[int, float] = {}
        self._reaches = {
            "hit": self._padded(world.reach),
            "jit": self._padded(world.after_miss()),
            "guess": self._padded(world.guess_reach),
        }

    def run(self) -> Result:
        """Until the last request has ended."""
        self._fill(np.flatnonzero(self._remaining == 0))
        self._serve()
        while not self._ended:
            self._now, _, action = heapq.heappop(self._events)
            action()
        return self._result

    # ---- the target --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The outcomes are known: find drafts for the next pass."""
        self._outcomes_at = self._now
        active = self._remaining > 0
        rows = int(active.sum())
        engine, plan, world = self._plan.engine, self._plan, self._world
        self._drafts[:] = 0
        if engine == "plain":
            self._begin_pass()
        elif engine == "sd":
            self._give(active, plan.k, "hit")
            self._after(world.serial_drafting(plan.k, rows), self._begin_pass)
        elif engine == "ours":
            self._look_up(active, rows)
            self._tell(active)
            self._begin_pass()
        else:
            self._ask(active)

    def _look_up(self, active: np.ndarray, rows: int) -> None:
        """Ours: what is there now."""
        depth = np.where(self._fresh, self._plan.k, self._depth[self._side])
        predicted = self._predicted(active)
        found = predicted & (depth > 0)
        cap = self._cap(rows)
        result = self._result
        result.hits += int(found.sum())
        result.late += int((found & (depth < self._plan.k)).sum())
        result.missed_late += int((predicted & ~found).sum())
        missed = active & ~found
        result.not_predicted += int((active & ~predicted).sum())
        self._give(found, np.minimum(depth, cap), "hit")
        guess = min(len(self._world.guess_reach), cap)
        if guess and self._world.guessed:
            guessed = missed & (self._random.random(len(missed)) < self._world.guessed)
            self._give(guessed, guess, "guess")
        self._fresh[:] = False

    def _tell(self, active: np.ndarray) -> None:
        """Ours: the outcomes are on their way, and the next table is awaited."""
        self._round += 1
        self._depth[:] = 0
        expected = self._world.target_pass.at(int(active.sum() + self._drafts.sum())) if self._plan.rests else 0.0
        for number, side in enumerate(self._sides):
            rows = int((active & (self._side == number)).sum())
            if not rows:
                continue
            self._result.messages += 1
            words = (self._round, rows, self._branches(rows), self._factor(), expected)
            self._after(self._world.latency, lambda side=side, words=words: side.begin(*words))  # type: ignore[misc]

    def _ask(self, active: np.ndarray) -> None:
        """The paper's engine: ask each draft, which answers when its table is whole, and then makes what is missing."""
        self._round += 1
        predicted = self._predicted(active)
        missed = active & ~predicted
        self._result.hits += int(predicted.sum())
        self._result.not_predicted += int(missed.sum())
        self._give(predicted, self._plan.k, "hit")
        if self._plan.backup == "jit":
            self._give(missed, self._plan.k, "jit")
        self._fresh[:] = False
        self._replies_due = 0
        for number in range(len(self._sides)):
            own = active & (self._side == number)
            if not own.any():
                continue
            self._replies_due += 1
            self._result.messages += 1
            late = int((own & missed).sum()) if self._plan.backup == "jit" else 0
            rows = int(own.sum())
            self._after(self._world.latency, lambda n=number, r=rows, m=late: self._answer(n, r, m))  # type: ignore[misc]

    def _answer(self, number: int, rows: int, missed: int) -> None:
        """On the draft's side, the question is there. Its table is whole, or it will ask itself again when it is."""
        if self._round > 1 and self._depth[number] < self._plan.k:
            self._asked[number] = (rows, missed)
            return
        self._depth[number] = 0
        side, world = self._sides[number], self._world
        jit = self._plan.k * world.draft_pass.at(missed) if missed else 0.0
        self._result.stalled += jit

        def reply() -> None:
            self._result.messages += 1
            self._after(world.latency, self._replied)
            side.begin(self._round, rows, self._branches(rows), self._factor())

        side.work(world.service + jit, reply)

    def _replied(self) -> None:
        self._replies_due -= 1
        if not self._replies_due:
            self._begin_pass()

    def _begin_pass(self) -> None:
        rows = int((self._remaining > 0).sum())
        drafts = int(self._drafts.sum())
        seconds = self._world.target_pass.at(rows + drafts) * self._factor()
        if self._plan.engine == "sd":
            seconds *= self._world.serial_factor
        self._result.waited += self._now - self._outcomes_at
        self._result.verified += drafts
        self._after(seconds, self._end_pass)

    def _end_pass(self) -> None:
        """Draw the outcomes, hand out tokens, let requests end and begin."""
        active = self._remaining > 0
        luck = self._random.random(len(active))
        accepted = np.minimum((luck[:, None] < self._reach).sum(axis=1), self._drafts)
        gained = np.where(active, np.minimum(accepted + 1, self._remaining), 0)
        self._remaining -= gained
        result = self._result
        result.tokens += int(gained.sum())
        result.rounds += int(active.sum())
        result.passes += 1
        result.seconds = self._now
        ended = active & (self._remaining == 0)
        if ended.any():
            result.request_seconds += float((self._now - self._started[ended]).sum())
            if not self._plan.waves or not self._remaining.any():
                self._fill(np.flatnonzero(self._remaining == 0))
        self._ended = not self._remaining.any()
        if not self._ended:
            self._serve()

    # ---- the draft side ----------------------------------------------------------------------------------------------

    def _published(self, side: DraftSide, number: int, depth: int) -> None:
        """A depth is done. Ours: it is on its way to the target. The paper's: the draft keeps it until it is whole."""
        index = self._sides.index(side)
        if self._plan.engine == "ours":
            self._after(self._world.latency, lambda: self._arrived(index, number, depth))
            return
        self._depth[index] = depth
        if depth == self._plan.k and index in self._asked:
            self._answer(index, *self._asked.pop(index))

    def _arrived(self, index: int, number: int, depth: int) -> None:
        self._result.messages += 1
        if number == self._round:
            self._depth[index] = depth

    # ---- chance and choice -------------------------------------------------------------------------------------------

    def _fill(self, places: np.ndarray) -> None:
        """Requests that wait get these places."""
        taken = places[: self._waiting]
        self._waiting -= len(taken)
        self._remaining[taken] = self._plan.tokens
        self._started[taken] = self._now
        self._fresh[taken] = True

    def _predicted(self, active: np.ndarray) -> np.ndarray:
        per_side = np.bincount(self._side[active], minlength=self._plan.drafts)
        rates = np.array([self._rate(int(rows)) for rows in per_side])
        drawn: np.ndarray = active & (self._random.random(len(active)) < rates[self._side])
        return drawn

    def _branches(self, rows: int) -> int:
        """N, cut where the rows of one forward would be too many."""
        most = self._plan.most_rows // rows if self._plan.most_rows else self._result.branches
        return max(1, min(self._result.branches, most))

    def _rate(self, rows: int) -> float:
        """The chance of a hit where one draft has so many requests."""
        if rows not in self._rates:
            self._rates[rows] = self._world.hits.at(self._branches(rows)) if rows else 0.0
        return self._rates[rows]

    def _give(self, rows: np.ndarray, drafts: int | np.ndarray, source: str) -> None:
        self._drafts = np.where(rows, drafts, self._drafts)
        self._reach[rows] = self._reaches[source]

    def _cap(self, rows: int) -> int:
        """How many drafts are worth verifying, by the policy's own rule."""
        plan, world = self._plan, self._world
        if not plan.adaptive:
            return plan.k
        if rows not in self._caps:
            # Lines that fall may reach 0 where they go on beyond the last point.
            without = max(world.target_pass.at(rows), _SHORTEST)
            slope = world.target_pass.line(rows, rows * (plan.k + 1))[1]
            hits = rows * self._rate(-(-rows // plan.drafts))
            pays = drafts_worth_verifying(world.reach[: plan.k], hits, rows, without, max(0.0, slope))
            self._caps[rows] = pays
        return self._caps[rows]

    def _padded(self, reach: tuple[float, ...]) -> np.ndarray:
        wide = max(1, self._plan.k)
        return np.array([*reach, *[0.0] * wide][:wide])

    def _factor(self) -> float:
        """How much longer than usual something takes: log-normal, 1 on average."""
        if not self._world.jitter:
            return 1.0
        variance = log(1 + self._world.jitter**2)
        return exp(float(self._random.normal(0.0, variance**0.5)) - variance / 2)

    def _clock(self) -> float:
        return self._now

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), action))
