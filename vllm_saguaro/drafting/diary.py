"""What the draft loop was busy with, told round by round to whoever writes a trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_saguaro.messages import Round, Work


class Diary:
    """Where nobody asks: nothing is noted."""

    def begin(self, rows: int, work: Work = Work.ROUND) -> None:
        """A round of so many requests begins. One that has not ended by now ends."""

    def glued(self) -> None:
        """The tokens that were lacking have been fed."""

    def grown(self) -> None:
        """There is one depth more."""

    def forked(self, branches: int) -> None:
        """Outcomes have been chosen: so many of each request, at most."""

    def end(self) -> None:
        """Nothing more comes of the round. Does nothing where none has begun."""

    def read(self, began: int, tokens: int) -> None:
        """A piece of a text has been read. `began`: what `now` said before."""

    def now(self) -> int:
        """The time, for `read`."""
        return 0


class KeptDiary(Diary):
    """Tells each round when it has ended."""

    def __init__(self, tell: Callable[[Round], None], clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`clock`: nanoseconds."""
        self._tell, self._clock = tell, clock
        self._open: tuple[Work, int] | None = None
        """Of the round that has begun: what it is, and of how many requests."""
        self._began = self._glued = self._forked = self._ended = 0
        self._branches = 0

    def begin(self, rows: int, work: Work = Work.ROUND) -> None:
        """A round of so many requests begins. One that has not ended by now ends."""
        self.end()
        self._open, self._branches = (work, rows), 0
        self._began = self._glued = self._forked = self._ended = self._clock()

    def glued(self) -> None:
        """The tokens that were lacking have been fed."""
        self._glued = self._forked = self._ended = self._clock()

    def forked(self, branches: int) -> None:
        """Outcomes have been chosen: so many of each request, at most."""
        self._forked = self._ended = self._clock()
        self._branches = branches

    def grown(self) -> None:
        """There is one depth more."""
        self._ended = self._clock()

    def end(self) -> None:
        """Nothing more comes of the round. Does nothing where none has begun."""
        if self._open is None:
            return
        (work, rows), self._open = self._open, None
        self._tell(Round(work, self._began, self._glued, self._forked, self._ended, rows, self._branches))

    def read(self, began: int, tokens: int) -> None:
        """A piece of a text has been read. `began`: what `now` said before."""
        now = self._clock()
        self._tell(Round(Work.PROMPT, began, now, now, now, tokens, 0))

    def now(self) -> int:
        """The time, for `read`."""
        return self._clock()


def diary(tell: Callable[[Round], None] | None) -> Diary:
    """One that tells, where somebody asks."""
    return Diary() if tell is None else KeptDiary(tell)
