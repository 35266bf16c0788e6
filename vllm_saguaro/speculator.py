"""The target side of a round: look each outcome up, hand the drafts over, tell the draft side.

Works on plain lists, so it serves any runner that has outcomes on the host. Only `backups.py` waits for the draft,
never long, and never where another row of the step has its drafts. Nothing that the draft does or fails to do can fail
a request: the worst case is a row that is verified without drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vllm_saguaro import counters
from vllm_saguaro.backups import Backups
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Admit, Miss, Outcome, Proposals, Release, Sampling, Step
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.policy import Judged, Policy, Source
from vllm_saguaro.slots import Shard, Slots
from vllm_saguaro.trace import Trace
from vllm_saguaro.turn import Drawn, Request, Turn, Verified

_TOLD_ANEW = 8192
"""Tokens of running requests that are told anew in one step, unless a single text is longer.

After a restart all are unknown at once: so they leave room, in the ring and in the step, for those that arrive.
"""

_FIRST_TRY = 8
"""Steps until a request is told anew that the draft side gave up: twice as many each time, since it may be one that it
can never have."""

_TELL_AFTER = 256
"""Steps after which the log has what was chosen."""


class Speculator:
    """Drafts for a batch, from the speculation cache that a draft side fills."""

    def __init__(
        self,
        channel: Channel,
        num_speculative_tokens: int,
        page: CounterPage,
        log: logging.Logger,
        policy: Policy,
        trace: Trace | None = None,
    ) -> None:
        """`trace`: whom to tell what happens; None: nobody asks."""
        self.channel = channel
        self.page = page
        self.policy = policy
        self._trace = trace or Trace()
        self._backups = Backups(channel, page, policy, self._trace)
        self._num_speculative_tokens = num_speculative_tokens
        self._log = log
        self._requests: dict[str, Request] = {}
        self._running: set[str] = set()
        self._slots = Slots(channel)
        self._given_up: dict[str, tuple[int, int]] = {}
        """By request: the step from which on it may be told anew, and how many steps it waited last."""
        self._left_out: set[str] = set()
        self._known_at: float | None = None
        self._in_hand_at: float | None = None
        self._warned = False
        self._said_quiet = False
        self._steps = 0

    # ---- one step of the loop ----------------------------------------------------------------------------------

    def propose(
        self, rows: Sequence[Verified], most: int | None = None, tokens_in: int | None = None
    ) -> list[list[int]]:
        """The drafts to verify next, row by row, `most` at most (None: K); `[]` where there are none.

        `tokens_in`: tokens that the step fed, where it only decoded.
        """
        known_at = time.perf_counter()
        self._trace.forward_ended(known_at, rows)
        self._notice_lives()
        self._measure(rows, tokens_in, known_at)
        resting = self.policy.resting(len(rows))
        self._trace.drawing(not resting)
        if resting:
            self.page.add(counters.QUIET_STEPS)
            self._in_hand_at = time.perf_counter()
            return [[] for _ in rows]
        worth = min(self._num_speculative_tokens if most is None else most, self._worth(rows))
        self.page.set(counters.DRAFTS, worth)
        self._steps += 1
        if self._steps == _TELL_AFTER:
            self._tell(len(rows))

        turns = [self._look_up(row) for row in rows if row.sampled]
        found_at = time.perf_counter()
        for turn in turns:
            turn.speculation = turn.speculation[:worth]
        self._backups.serve(turns, worth)
        in_hand_at = time.perf_counter()
        if turns:
            self._trace.served(known_at, rows)

        step = Step()
        for turn in turns:
            self._settle(turn, step)
        # A text is told as it is, without drafts under verification: one that has some waits until it has none.
        unknown = [turn for turn in turns if turn.request is None or turn.given_up]
        self._learn_anew([turn.row for turn in unknown if not turn.speculation], step)
        self._post(step)
        if step.outcomes:
            self.page.observe(counters.TARGET_WAIT, found_at - known_at)
        if self.policy.quiet:
            self._go_quiet(len(rows))
        self._in_hand_at = in_hand_at
        proposed = {turn.row.request_id: list(turn.speculation) for turn in turns}
        return [proposed.get(row.request_id, []) for row in rows]

    def _worth(self, rows: Sequence[Verified]) -> int:
        """How many drafts of each row are worth verifying."""
        return self.policy.drafts(len(rows), sum(not row.greedy for row in rows))

    def _measure(self, rows: Sequence[Verified], tokens_in: int | None, known_at: float) -> None:
        """Take in what this step was: its time, and what came of its drafts."""
        before, self._known_at = self._known_at, known_at
        if self._in_hand_at is not None and before is not None:
            seconds, tokens_out = known_at - self._in_hand_at, sum(len(row.sampled) for row in rows)
            self.page.observe(counters.VERIFY, seconds)
            drafts = None if tokens_in is None else tokens_in - len(rows)
            drawn = sum(row.verified for row in rows if not row.greedy)
            self.policy.observe_step(len(rows), drafts, drawn, tokens_out, seconds, known_at - before)
        judged = []
        for row in rows:
            request = self._requests.get(row.request_id)
            if row.sampled and row.verified and request is not None and request.drawn is not None:
                judged.append(Judged(request.drawn.source, row.verified, len(row.sampled) - 1))
        self.policy.observe_drafts(judged)

    def _look_up(self, row: Verified) -> Turn:
        """Find the outcome (k, t*) of a row among the predicted ones."""
        turn = Turn(row, len(row.sampled) - 1, row.sampled[-1])
        request = self._requests.get(row.request_id)
        if request is None or request.length + len(row.sampled) != row.length or not self._fits(row.length):
            return self._miss(turn, Miss.ABSENT)
        turn.request = request
        table = self.channel.read(request.stamp.slot)
        if table is None or table.stamp != request.stamp:
            if table is not None and table.stamp == request.stamp.gone():
                turn.given_up = True
                self._given_up.setdefault(row.request_id, (self._steps + _FIRST_TRY, _FIRST_TRY))
                return self._miss(turn, Miss.ABSENT)
            return self._miss(turn, Miss.LATE if self.channel.epoch(request.stamp.slot) else Miss.ABSENT)
        turn.wanted = True
        self.page.set(counters.BRANCHES, len(table.bonus))
        branch = table.find(turn.accepted, turn.bonus)
        if branch is None:
            return self._miss(turn, Miss.NOT_PREDICTED)
        turn.speculation = table.speculation(branch)
        if not turn.speculation:
            return self._miss(turn, Miss.LATE)
        turn.drawn = Drawn(Source.CACHE, request.stamp, table.version, branch)
        self.policy.observe_look_up(hit=True)
        self.page.add(counters.HITS)
        if len(turn.speculation) < self._num_speculative_tokens:
            self.page.add(counters.LATE_TABLES)
        else:
            self.page.observe(counters.DRAFT_ROUND, table.seconds)
        self.policy.observe_round(len(turn.speculation), table.seconds)
        return turn

    def _miss(self, turn: Turn, cause: Miss) -> Turn:
        self.page.add(counters.MISSES[cause])
        if cause is not Miss.ABSENT:
            self.policy.observe_look_up(hit=False)
        return turn

    def _settle(self, turn: Turn, step: Step) -> None:
        """Note the outcome of a row, and what it has under verification next, for the draft side."""
        row, request = turn.row, turn.request
        if request is None:
            return
        step.outcomes.append(
            Outcome(request.stamp, turn.accepted, turn.bonus, row.length, turn.speculation, row.verified)
        )
        request.length = row.length
        request.stamp = request.stamp.next()
        request.drawn = turn.drawn if turn.speculation else None

    def proposals(self, request_id: str, count: int) -> Proposals | None:
        """The q that the first `count` drafts under verification of a request were drawn from.

        None: they are certain, or it is not known any more, which is as exact.
        """
        request = self._requests.get(request_id)
        drawn = request.drawn if request is not None else None
        if drawn is None or drawn.source is Source.NGRAM:
            return None
        return self.channel.proposals(drawn.stamp, drawn.version, drawn.branch, count)

    def _tell(self, rows: int) -> None:
        """Say once what was chosen."""
        self._log.info(
            "Saguaro, at %d running requests: %d of %d drafts verified, %d branches, hit rate %.2f; missed outcomes "
            "that got drafts: %s. What is chosen from now on is in the metrics vllm:saguaro_*.",
            rows,
            self.page.value(counters.DRAFTS),
            self._num_speculative_tokens,
            self.page.value(counters.BRANCHES),
            self.policy.hit_rate,
            ", ".join(f"{self.page.value(counter):.0f} by {kind}" for kind, counter in counters.BACKUPS.items()),
        )

    def _go_quiet(self, rows: int) -> None:
        """Drafting does not pay now: let the draft side forget everything, and rest."""
        step = Step()
        for request_id in list(self._requests):
            self._release(request_id, step)
        self._post(step)
        if not self._said_quiet:
            self._said_quiet = True
            self._log.info(
                "At %d running requests drafts cost more than they save here: decoding goes on without, and they are "
                "tried again from time to time.",
                rows,
            )

    # ---- requests that come and go -----------------------------------------------------------------------------

    def begin_step(self, arrived: Sequence[tuple[str, Sequence[int], Sampling]], left: Sequence[str]) -> None:
        """Before the target's pass: `arrived` as (request id, prompt tokens, sampling), `left` as request ids.

        The draft reads a prompt while the target does.
        """
        self._notice_lives()
        self.page.set(counters.SAMPLING_C, self.channel.sampling_c)
        step = Step()
        for request_id in left:
            self._release(request_id, step)
            self._given_up.pop(request_id, None)
        self._running.difference_update(left)
        if not self._running:
            self._in_hand_at = self._known_at = None  # a pause between requests is no verify pass
        for request_id, tokens, sampling in arrived:
            self._running.add(request_id)
            self._release(request_id, step)  # an id that is used again, without its end having been seen
            self._given_up.pop(request_id, None)
            if not self.policy.quiet:
                self._admit(request_id, tokens, sampling, step)
        self._post(step)
        self._trace.forward_began()

    def _admit(
        self, request_id: str, tokens: Sequence[int], sampling: Sampling, step: Step, anew: bool = False
    ) -> None:
        if not self._slots.has_room:  # perhaps no draft side is there yet, and it is not known how much it can hold
            return
        if not self._fits(len(tokens)):
            self._leave_out(request_id)
            return
        stamp = self._slots.take(anew)
        if stamp is None:
            return
        self._requests[request_id] = Request(stamp, len(tokens))
        step.admits.append(Admit(stamp, sampling, tuple(tokens)))

    def _release(self, request_id: str, step: Step) -> None:
        self._left_out.discard(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._slots.give(request.stamp.slot)
            step.releases.append(Release(request.stamp))

    def _learn_anew(self, rows: Sequence[Verified], step: Step) -> None:
        """Let the draft side have requests that it does not have, or has otherwise, unless they are too long for it.

        The shortest first, and no more at once than what is left for the next steps to tell.
        """
        if not self._slots.learns:
            return
        told = 0
        for row in sorted(rows, key=lambda row: row.length):
            if row.request_id in self._left_out:
                continue
            if told and told + row.length > _TOLD_ANEW:
                break
            if not self._may_try(row.request_id):
                continue
            self._release(row.request_id, step)
            if not self._slots.has_room_anew:
                continue
            if not self._fits(row.length):
                self._leave_out(row.request_id)
            else:
                self._admit(row.request_id, row.tokens(), row.sampling(), step, anew=True)
                told += row.length

    def _may_try(self, request_id: str) -> bool:
        """Whether a request that the draft side gave up may be told anew; the next time it will take twice as long."""
        if request_id not in self._given_up:
            return True
        at, waited = self._given_up[request_id]
        if self._steps < at:
            return False
        self._given_up[request_id] = self._steps + 2 * waited, 2 * waited
        return True

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
        """Tell each draft side its part: what one of them does not take is no matter of the others."""
        shards = self._slots.shards
        for shard in shards:
            self._tell_shard(shard, step if len(shards) == 1 else step.part(shard.slots))

    def _tell_shard(self, shard: Shard, step: Step) -> None:
        """Tell a draft side. What it refuses it will never see: those requests are forgotten, and learnt anew later.

        Each text goes in a frame of its own, so that one which finds no room takes nothing else with it. Releases are
        said again until they are taken: the draft side holds memory for those requests.
        """
        texts, step.admits = step.admits, []
        step.releases = shard.unheard + step.releases
        taken = not step or self.channel.post(step)
        refused = [] if taken else [outcome.stamp for outcome in step.outcomes]
        shard.unheard = [] if taken else [*step.releases, *map(Release, refused)]
        refused += [admit.stamp for admit in texts if not self.channel.post(Step(admits=[admit]))]
        if taken and not refused:
            shard.took(bool(texts or step))
            return
        shard.did_not_take()
        slots = {stamp.slot for stamp in refused}
        for request_id in [r for r, request in self._requests.items() if request.stamp.slot in slots]:
            self._slots.give(self._requests.pop(request_id).stamp.slot)

    def _notice_lives(self) -> None:
        """Forget what a draft side that has ended knew; the next one learns it anew, a few texts a step."""
        for shard in self._slots.look():
            shard.unheard = []
            for request_id in [r for r, request in self._requests.items() if request.stamp.slot in shard.slots]:
                stamp = self._requests.pop(request_id).stamp
                self._slots.give(stamp.slot)
                if shard.epoch:  # it was told of as the life before ended: the new one may have heard it
                    shard.unheard.append(Release(stamp))
            self._given_up.clear()
            if shard.epoch:
                self.policy.begin_anew()
                self._log.info("The draft side is back: running requests are told to it anew.")
