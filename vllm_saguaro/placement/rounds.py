"""The rounds of a draft side in its mailbox, for a trace: written as they end, read by whoever writes the trace.

A ring of its own with one writer and one reader, and nobody waits: a reader that is slower than the room lasts loses
the oldest. A round is written between two stores of its number (0 before, the number after), so that one which is
overwritten while it is read is seen to be. Nothing of it is believed; what cannot be is left out.
"""

from __future__ import annotations

import threading

from vllm_saguaro.messages import Round, Work
from vllm_saguaro.placement.layout import ROUND_WORDS, MailboxShape

LONGEST = 3600 * 10**9
"""Nanoseconds: a round that says that it took longer is none."""
_MOST_WORD = 2**62 - 1
_WORKS = frozenset(Work)
_MOST_ROWS = 2**31


class Rounds:
    """Both halves over the memory of one mailbox; each side uses its own."""

    def __init__(self, words: memoryview, shape: MailboxShape) -> None:
        """`words`: the `rounds` part of the mailbox, in 64 bits each."""
        self._words, self._room, self._branches = words, shape.rounds, shape.branches
        self._written = self._taken = 0
        self._fence = threading.Lock()  # see `Mailbox`

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()

    def put(self, one: Round) -> None:
        """Draft side: one more."""
        self._written += 1
        at = self._at(self._written)
        self._store(at, 0)
        values = (one.work, one.began, one.glued, one.forked, one.ended, one.rows, one.branches)
        for place, value in enumerate(values, start=at + 1):
            self._words[place] = value
        self._store(at, self._written)
        self._store(0, self._written)

    def take(self) -> list[Round]:
        """Target side: those that have not been taken yet, in their order. To be called from one thread alone."""
        newest = self._words[0]
        if not self._taken < newest <= _MOST_WORD:
            self._taken = newest if 0 <= newest <= _MOST_WORD else self._taken
            return []
        first = max(self._taken, newest - self._room) + 1
        self._taken = newest
        found = (self._read(number) for number in range(first, newest + 1))
        return [one for one in found if one is not None]

    def _read(self, number: int) -> Round | None:
        at = self._at(number)
        with self._fence:
            before = self._words[at]
        with self._fence:
            values = self._words[at + 1 : at + ROUND_WORDS].tolist()
        with self._fence:
            if before != number or self._words[at] != number:
                return None
        return round_of(values, self._branches)

    def _at(self, number: int) -> int:
        return 1 + number % self._room * ROUND_WORDS

    def _store(self, at: int, value: int) -> None:
        """A store that nothing before or after it passes."""
        with self._fence:
            pass
        with self._fence:
            self._words[at] = value
        with self._fence:
            pass


def round_of(values: list[int], most_branches: int) -> Round | None:
    """The round with these numbers, as `put` writes them; None where they cannot be."""
    work, began, glued, forked, ended, rows, branches = values
    if not (
        work in _WORKS
        and 0 < began <= glued <= forked <= ended <= min(began + LONGEST, _MOST_WORD)
        and 0 <= rows < _MOST_ROWS
        and 0 <= branches <= most_branches
    ):
        return None
    return Round(Work(work), began, glued, forked, ended, rows, branches)
