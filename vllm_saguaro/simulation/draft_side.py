"""One draft model as the events see it: a forward at a time, never broken off, and a look at its mail in between."""

from __future__ import annotations

from collections.abc import Callable

from vllm_saguaro.algorithm.timing import PATIENCE, comes_too_late
from vllm_saguaro.simulation.world import World

Schedule = Callable[[float, Callable[[], None]], None]
"""Have something done so many seconds from now."""


class DraftSide:
    """Builds the table of a round: a glue forward over the requests, then K forwards over all of their branches."""

    def __init__(
        self,
        world: World,
        k: int,
        clock: Callable[[], float],
        schedule: Schedule,
        publish: Callable[[DraftSide, int, int], None],
    ) -> None:
        """`publish(side, round, depth)` is called when a depth is done: on this side, not where it is read."""
        self._world, self._k, self._clock, self._schedule, self._publish = world, k, clock, schedule, publish
        self._round, self._depth = -1, 0
        self._rows, self._branches, self._factor = 0, 0, 1.0
        self._known_at = self._expected = 0.0
        self._busy = False
        self._next: tuple[int, int, int, float, float, float] | None = None

    def begin(self, number: int, rows: int, branches: int, factor: float, expected: float = 0.0) -> None:
        """The outcomes of round `number` are here: `rows` requests, N `branches` each; times `factor` its usual time.

        What it was doing is history; but the forward under way comes to its end first. `expected`: seconds until the
        next outcomes, where depths that would not be there by then are not begun; 0: all are.
        """
        self._next = (number, rows, branches, factor, self._clock(), expected)
        if not self._busy:
            self._begin_next()

    def work(self, seconds: float, then: Callable[[], None]) -> None:
        """Something else that takes its time first, as a reply does. Only while it is idle."""
        assert not self._busy, "a draft does one thing at a time"
        self._busy = True

        def done() -> None:
            self._busy = False
            then()
            if not self._busy and self._next is not None:
                self._begin_next()

        self._schedule(seconds, done)

    def _begin_next(self) -> None:
        assert self._next is not None
        self._round, self._rows, self._branches, self._factor, self._known_at, self._expected = self._next
        self._next, self._depth = None, 0
        if not self._rows:
            return
        self._forward(self._world.fork + self._world.draft_pass.at(self._rows), glue=True)

    def _forward(self, seconds: float, glue: bool = False) -> None:
        self._busy = True
        self._schedule(self._factor * seconds, lambda: self._forward_done(glue))

    def _forward_done(self, glue: bool) -> None:
        self._busy = False
        if self._next is not None:
            self._begin_next()
            return
        if not glue:
            self._depth += 1
            self._publish(self, self._round, self._depth)
        if self._depth < self._k and not self._busy:
            self._grow()

    def _grow(self) -> None:
        seconds, elapsed = self._world.draft_pass.at(self._rows * self._branches), self._clock() - self._known_at
        if not self._depth or not comes_too_late(seconds, self._expected, elapsed):
            self._forward(seconds)
            return
        number = self._round

        def overdue() -> None:
            if number == self._round and not self._busy and self._next is None:
                self._forward(seconds)

        self._schedule(PATIENCE * self._expected - elapsed, overdue)
