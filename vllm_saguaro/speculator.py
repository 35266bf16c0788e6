"""The target side of a round: look each outcome up, hand the drafts over, tell the draft side.

Works on plain lists, so it serves any runner that has outcomes on the host. Nothing here waits for the draft, and
nothing that the draft does or fails to do can fail a request: the worst case is a row that is verified without
drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Admit, Miss, Outcome, Release, Stamp, Step
from vllm_saguaro.placement.channel import Channel

_LONGEST_REST = 63
"""Posts without learning anew, at most, for a draft side that refuses what it is told: it hangs, or is far behind."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One row of a step of the target.

    `sampled`: the accepted drafts and then the bonus token; empty when the row was a piece of a prompt. `length`:
    tokens of the request with them. `tokens` and `temperature` are asked for only when the draft side has to learn
    the request anew.
    """

    request_id: str
    sampled: Sequence[int]
    length: int
    tokens: Callable[[], Sequence[int]]
    temperature: Callable[[], float]


@dataclass(slots=True)
class _Request:
    """What the target side knows of a request that the draft side has."""

    stamp: Stamp
    length: int


class Speculator:
    """Drafts for a batch, from the speculation cache that a draft side fills."""

    def __init__(
        self, channel: Channel, slots: int, num_speculative_tokens: int, page: CounterPage, log: logging.Logger
    ) -> None:
        """`slots`: requests that the channel can hold tables for."""
        self.channel = channel
        self.page = page
        self._num_speculative_tokens = num_speculative_tokens
        self._log = log
        self._requests: dict[str, _Request] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._generations = [0] * slots
        self._left_out: set[str] = set()
        self._in_hand_at: float | None = None
        self._lost = False
        self._unheard: list[Release] = []
        self._rest = 0
        self._refusals = 0
        self._warned = False

    # ---- one step of the loop ----------------------------------------------------------------------------------

    def propose(self, rows: Sequence[Verified], most: int | None = None) -> list[list[int]]:
        """The drafts to verify next, row by row, `most` at most (None: K); `[]` where there are none."""
        known_at = time.perf_counter()
        self._notice_the_end()
        step = Step()
        most = self._num_speculative_tokens if most is None else most
        drafts = [list(self._turn(row, step, most)) if row.sampled else [] for row in rows]
        in_hand_at = time.perf_counter()
        self._post(step)
        if step.outcomes:
            self.page.observe(counters.TARGET_WAIT, in_hand_at - known_at)
            if self._in_hand_at is not None:
                self.page.observe(counters.VERIFY, known_at - self._in_hand_at)
        self._in_hand_at = in_hand_at if step.outcomes else None
        return drafts

    def _turn(self, row: Verified, step: Step, most: int) -> tuple[int, ...]:
        """Settle one row: find its outcome (k, t*) among the predicted ones, and note it for the draft side."""
        accepted, bonus = len(row.sampled) - 1, row.sampled[-1]
        request = self._requests.get(row.request_id)
        if request is None or request.length + accepted + 1 != row.length or not self._fits(row.length):
            self._learn_anew(row, step)
            return self._miss(Miss.ABSENT)
        speculation = self._look_up(request, accepted, bonus)[:most]
        step.outcomes.append(Outcome(request.stamp, accepted, bonus, row.length, speculation))
        request.length = row.length
        request.stamp = request.stamp.next()
        return speculation

    def _look_up(self, request: _Request, accepted: int, bonus: int) -> tuple[int, ...]:
        table = self.channel.read(request.stamp.slot)
        if table is None or table.stamp != request.stamp:
            gone = table is not None and table.stamp == request.stamp.gone()
            return self._miss(Miss.ABSENT if gone or not self.channel.alive else Miss.LATE)
        branch = table.find(accepted, bonus)
        if branch is None:
            return self._miss(Miss.NOT_PREDICTED)
        speculation = table.speculation(branch)
        if not speculation:
            return self._miss(Miss.LATE)
        self.page.add(counters.HITS)
        if len(speculation) < self._num_speculative_tokens:
            self.page.add(counters.LATE_TABLES)
        else:
            self.page.observe(counters.DRAFT_ROUND, table.seconds)
        return speculation

    def _miss(self, cause: Miss) -> tuple[int, ...]:
        self.page.add(counters.MISSES[cause])
        return ()

    # ---- requests that come and go -----------------------------------------------------------------------------

    def begin_step(self, arrived: Sequence[tuple[str, Sequence[int], float]], left: Sequence[str]) -> None:
        """Before the target's pass: `arrived` as (request id, prompt tokens, temperature), `left` as request ids.

        The draft reads a prompt while the target does.
        """
        self._notice_the_end()
        step = Step()
        for request_id in left:
            self._release(request_id, step)
        if not self._requests:
            self._in_hand_at = None  # a pause between requests is no verify pass
        for request_id, tokens, temperature in arrived:
            self._release(request_id, step)  # an id that is used again, without its end having been seen
            self._admit(request_id, tokens, temperature, step)
        self._post(step)

    def _admit(self, request_id: str, tokens: Sequence[int], temperature: float, step: Step) -> None:
        if not self._free or not self.channel.alive:
            return
        if not self._fits(len(tokens)):
            self._leave_out(request_id)
            return
        slot = self._free.pop()
        self._generations[slot] += 1
        stamp = Stamp(slot, self._generations[slot], 0)
        self._requests[request_id] = _Request(stamp, len(tokens))
        step.admits.append(Admit(stamp, temperature, tuple(tokens)))

    def _release(self, request_id: str, step: Step) -> None:
        self._left_out.discard(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._free.append(request.stamp.slot)
            step.releases.append(Release(request.stamp))

    def _learn_anew(self, row: Verified, step: Step) -> None:
        """Let the draft side have a request that it does not have, or has otherwise, unless it is too long for it."""
        if row.request_id in self._left_out or not self.channel.alive or self._rest:
            return
        self._release(row.request_id, step)
        if not self._fits(row.length):
            self._leave_out(row.request_id)
        elif self._free:
            self._admit(row.request_id, row.tokens(), row.temperature(), step)

    def _fits(self, length: int) -> bool:
        return length + self._num_speculative_tokens + 1 <= self.channel.max_length

    def _leave_out(self, request_id: str) -> None:
        self._left_out.add(request_id)
        if not self._warned:
            self._warned = True
            self._log.warning(
                "Request %s is longer than the draft model can hold (%d tokens): it goes on without drafts, as will "
                "others like it.",
                request_id,
                self.channel.max_length,
            )

    def _post(self, step: Step) -> None:
        """Tell the draft side. What it refuses it will never see: those requests are forgotten, and learnt anew later.

        Each text goes in a frame of its own, so that one which finds no room takes nothing else with it. Releases are
        said again until they are taken: the draft side holds memory for those requests.
        """
        texts, step.admits = step.admits, []
        step.releases = self._unheard + step.releases
        taken = not step or self.channel.post(step)
        self._unheard = [] if taken or not self.channel.alive else step.releases
        refused = [] if taken else [outcome.stamp for outcome in step.outcomes]
        refused += [admit.stamp for admit in texts if not self.channel.post(Step(admits=[admit]))]
        if taken and not refused:
            if self._rest:
                self._rest -= 1
            elif texts or step:
                self._refusals = 0
            return
        self._rest = min(2 ** min(self._refusals, 6) - 1, _LONGEST_REST)
        self._refusals += 1
        slots = {stamp.slot for stamp in refused}
        for request_id in [r for r, request in self._requests.items() if request.stamp.slot in slots]:
            self._free.append(self._requests.pop(request_id).stamp.slot)

    def _notice_the_end(self) -> None:
        if not self.channel.alive and not self._lost:
            self._lost = True
            self._log.error("The draft side has ended: decoding goes on without drafts.")
