"""Drafts for the rows of a step whose outcome nobody predicted, and the rest of those that came late.

SSD paper, section 4.3; what is worth it is decided in `policy.py`. No row that has all its drafts ever waits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Step, Want
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.policy import Judged, Policy, Source
from vllm_saguaro.trace import Trace
from vllm_saguaro.turn import Drawn, Turn

_POLL_SECONDS = 20e-6

_HANGS_AFTER = 4.0
"""A step that has waited unread for so many verify passes: the draft side hangs, or is in a forward as long as that."""


class Backups:
    """N-gram guesses, and drafts that the draft side makes just in time."""

    def __init__(self, channel: Channel, page: CounterPage, policy: Policy, trace: Trace) -> None:
        self._channel, self._page, self._policy, self._trace = channel, page, policy, trace

    def serve(self, turns: Sequence[Turn], most: int) -> None:
        """Drafts from elsewhere for the rows that missed, and the rest of those that are late.

        A row that has all its drafts waits for neither.
        """
        if not most:
            return
        found = [turn for turn in turns if turn.speculation]
        missed = [turn for turn in turns if not turn.speculation]
        if missed:
            self._back_up(missed, len(found), most)
        if found:
            self._finish(found, most)

    def _back_up(self, missed: Sequence[Turn], found: int, most: int) -> None:
        guesses = [tuple(turn.row.guess(most)) if turn.request is not None else () for turn in missed]
        hits = found + sum(not turn.wanted for turn in missed)
        choice = self._policy.back_up([bool(guess) for guess in guesses], hits, most)
        waiting = []
        for turn, guess, kind in zip(missed, guesses, choice.rows, strict=True):
            if kind == "ngram" and turn.request is not None:
                self._page.add(counters.BACKUPS[kind])
                turn.speculation = guess[: choice.ngram_tokens]
                turn.drawn = Drawn(Source.NGRAM, turn.request.stamp, 0, 0)
            elif kind == "jit":
                waiting.append(turn)
        if waiting:
            self._wait(waiting, choice.jit_drafts)

    def _finish(self, found: Sequence[Turn], most: int) -> None:
        """If all rows that hit have too few drafts, of late tables: wait for the rest of their branches, if it pays."""
        before = [len(turn.speculation) for turn in found]
        have = min(before)
        # Tables that are more than one depth apart are no longer of one tree, and would be begun anew.
        if max(before) >= most or max(before) > have + 1:
            return
        more = self._policy.more_depths(have, most, len(found))
        if not more:
            return
        seconds = self._await(found, have + more, "late")
        if seconds:
            gained = sum(len(turn.speculation) for turn in found) - sum(before)
            self._policy.observe_late(more, gained / len(found), seconds)
        for turn in found:
            if turn.drawn is not None:
                turn.drawn = dataclasses.replace(turn.drawn, source=Source.CACHE)

    def _wait(self, turns: Sequence[Turn], depth: int) -> None:
        """Wait for just-in-time drafts of outcomes that nobody predicted."""
        seconds = self._await(turns, depth, "just in time")
        if not seconds:  # the draft side could not be told
            return
        reached = min(len(turn.speculation) for turn in turns)
        self._policy.observe_jit(reached or depth, seconds)
        if not reached:  # a wait in vain is worth what drafts are that are never accepted
            self._policy.observe_drafts([Judged(Source.JIT, 1, 0)])
        for turn in turns:
            if turn.speculation:
                self._page.add(counters.BACKUPS["jit"])

    def _await(self, turns: Sequence[Turn], depth: int, why: str) -> float:
        """Have the draft side go on with these outcomes alone, and wait, but never for long; the seconds it took.

        0.0 where it was not told: it is not there, has no room, or hangs.
        """
        if self._channel.stalled_seconds > _HANGS_AFTER * self._policy.verify_pass:
            return 0.0
        began = time.perf_counter()
        wants = [Want(t.request.stamp, t.accepted, t.bonus, depth) for t in turns if t.request is not None]
        if not self._channel.post(Step(wants=wants)):
            return 0.0
        deadline = began + self._policy.patience(depth)
        waiting = list(turns)
        while True:
            waiting = [turn for turn in waiting if not self._arrived(turn, depth)]
            if not waiting or not self._channel.alive or time.perf_counter() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        ended = time.perf_counter()
        seconds = ended - began
        self._page.observe(counters.BACKUP_WAIT, seconds)
        self._trace.waited(began, ended, len(turns), why)
        return seconds

    def _arrived(self, turn: Turn, depth: int) -> bool:
        """Take what there is of a row's just-in-time drafts; whether that is all of them."""
        request = turn.request
        assert request is not None
        table = self._channel.read(request.stamp.slot)
        branch = table.find(turn.accepted, turn.bonus) if table is not None and table.stamp == request.stamp else None
        if table is None or branch is None:
            return False
        drafts = table.speculation(branch)[:depth]
        if len(drafts) < len(turn.speculation):  # it is being written anew
            return False
        turn.speculation = drafts
        turn.drawn = Drawn(Source.JIT, request.stamp, table.version, branch)
        return len(turn.speculation) == depth
