"""What the target side decides by itself, step by step, from what it has measured: how many drafts to verify, what a
missed request gets, and when drafting does not pay at all.

Tokens are counted and passes timed as they come; the choices are pure functions in `algorithm/timing.py` and
`algorithm/backup.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import cast, get_args

from vllm_saguaro.algorithm import backup, timing
from vllm_saguaro.algorithm.backup import BackupChoice, BackupMode
from vllm_saguaro.algorithm.measured import LinearTime, Mean
from vllm_saguaro.algorithm.priors import Priors
from vllm_saguaro.algorithm.verify_time import VerifyTime


class Source(StrEnum):
    """Where the drafts of a row came from."""

    CACHE = "cache"
    JIT = "jit"
    NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of the drafts of one row: `source` of them, `verified` in the pass, `accepted` of these."""

    source: Source
    verified: int
    accepted: int


_PRIOR_ACCEPTANCE = {Source.CACHE: 0.7, Source.JIT: 0.7, Source.NGRAM: 0.4}
_PRIOR_HIT_RATE = 0.8
_MEASURED_WEIGHT = 4
"""What was measured before the start weighs so many times what is assumed; it fades likewise."""
_LINE_WEIGHT = 64.0
"""The slope of a pass that was measured before counts like a spread of eight tokens."""

_LOOK_AGAIN = 64
"""Every so many steps all drafts are verified, so that the chances of those that were left out are known as well."""

_STEPS_BEFORE_QUIET = 16
"""So many steps in a row must find that drafting does not pay. Chance alone does not do that."""
_FIRST_REST, _LONGEST_REST = 256, 8192
"""Steps without drafts before it is tried again: twice as many each time that it still does not pay."""
_TRIAL = 24
"""Steps of such a trial, with all drafts verified: the draft side has to read the texts first."""

_PATIENCE = 3.0
"""Just-in-time drafts are waited for this many times as long as they take on average."""


class Policy:
    """The choices of one engine, and the measurements behind them."""

    def __init__(
        self,
        num_speculative_tokens: int,
        backup_mode: str,
        adaptive: bool = True,
        priors: Priors | None = None,
        branches: int = 1,
    ) -> None:
        """`adaptive` False: always K drafts, never quiet. `priors`: what to begin with, measured before; `branches`:
        N at most, for which they are looked up. Raises ValueError for an unknown backup.
        """
        if backup_mode not in get_args(BackupMode):
            raise ValueError(f"the backup {backup_mode!r} is none of {', '.join(get_args(BackupMode))}")
        self._most = num_speculative_tokens
        self._mode = cast(BackupMode, backup_mode)
        self._adaptive = adaptive
        self._pass = VerifyTime(0.0, 0.0)
        self._drawn = 0.0
        self._tokens = Mean(1.0, decay=0.95)
        self._seconds = Mean(1e-3, decay=0.95)
        self._accepted = {
            source: [Mean(prior, prior_weight=4.0, decay=0.99) for _ in range(num_speculative_tokens)]
            for source, prior in _PRIOR_ACCEPTANCE.items()
        }
        self._prior_hit_rate = _PRIOR_HIT_RATE
        self._hit_rate = Mean(_PRIOR_HIT_RATE, prior_weight=16.0, decay=0.995)
        self._jit = LinearTime(0.0, 1e-3)
        self._jit_waits = 0
        self._draft_step = Mean(0.0, prior_weight=1e-6, decay=0.95)
        if priors is not None:
            self._begin_with(priors, branches)
        self._late = LinearTime(0.0, 0.0)
        self._late_gain = Mean(1.0, prior_weight=4.0, decay=0.9)
        self._steps = 0
        self._in_vain = 0
        self._rest = _FIRST_REST
        self._quiet_until = 0
        self._quiet_rows = 0
        self._trial = 0

    def _begin_with(self, priors: Priors, branches: int) -> None:
        """Passes, acceptance, hits and drafts of the first steps as they were measured before."""
        self._pass = VerifyTime(*priors.target_pass, prior_weight=_LINE_WEIGHT)
        self._seconds = Mean(priors.target_seconds(1), decay=0.95)
        for source in (Source.CACHE, Source.JIT):
            self._accepted[source] = [
                Mean(chance, prior_weight=4.0 * _MEASURED_WEIGHT, decay=0.99) for chance in priors.chances(self._most)
            ]
        self._prior_hit_rate = priors.hit_rate(branches)
        self._hit_rate = Mean(self._prior_hit_rate, prior_weight=16.0 * _MEASURED_WEIGHT, decay=0.995)
        self._draft_step = Mean(sum(priors.draft_step), decay=0.95)

    def begin_anew(self) -> None:
        """Another draft side is there: what was found while none answered, or of one that hung, says nothing of it."""
        self._hit_rate = Mean(self._prior_hit_rate, prior_weight=16.0, decay=0.995)
        self._in_vain, self._rest, self._quiet_until, self._trial = 0, _FIRST_REST, 0, _TRIAL

    # ---- what was measured -----------------------------------------------------------------------------------------

    def observe_step(
        self, rows: int, drafts: int | None, drawn: int, tokens_out: int, seconds: float, whole: float
    ) -> None:
        """A step that decoded only, of `rows` requests with `drafts` drafts in all, gave `tokens_out` tokens.

        `drawn` of the drafts belonged to requests that sample. `seconds` from the drafts in hand to the outcomes,
        `whole` from outcomes to outcomes. `drafts` None: there was prefill in it, which tells nothing of a decode step.
        """
        if drafts is None:
            return
        self._pass.observe(rows, drafts, drawn, seconds)
        self._tokens.observe(tokens_out)
        self._seconds.observe(whole)

    def observe_drafts(self, judged: Iterable[Judged]) -> None:
        """What came of drafts that were verified."""
        for row in judged:
            chances = self._accepted[row.source]
            for j in range(min(row.accepted + 1, row.verified, self._most)):
                chances[j].observe(1.0 if j < row.accepted else 0.0)

    def observe_look_up(self, hit: bool) -> None:
        """An outcome was looked for in the cache, of a request that the draft side has."""
        self._hit_rate.observe(1.0 if hit else 0.0)

    def observe_jit(self, depth: int, seconds: float) -> None:
        """Just-in-time drafts were `depth` deep after `seconds`."""
        if depth:
            self._jit.observe(depth, seconds)
            self._jit_waits += 1

    def observe_late(self, asked: int, gained: float, seconds: float) -> None:
        """A wait for `asked` more drafts of late branches took `seconds` and gave each row `gained` on average."""
        self._late.observe(asked, seconds)
        self._late_gain.observe(gained / asked)

    def observe_round(self, depth: int, seconds: float) -> None:
        """A table of `depth` was finished after `seconds`: glue, fork, and a step over all branches for each depth."""
        self._draft_step.observe(seconds / (depth + 1))

    # ---- what follows from it ----------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        """Tokens a second of this engine, of all requests together."""
        return self._tokens.value / self._seconds.value

    @property
    def hit_rate(self) -> float:
        """Share of outcomes that are in the cache, of late."""
        return self._hit_rate.value

    def reach(self, source: Source) -> list[float]:
        """P(at least j of the drafts are accepted) for j = 1 .. K: the product of the chances so far."""
        reach, chance = [], 1.0
        for mean in self._accepted[source]:
            chance *= mean.value
            reach.append(chance)
        return reach

    @property
    def quiet(self) -> bool:
        """Whether the next step goes without drafts altogether."""
        return self._steps < self._quiet_until

    def resting(self, rows: int) -> bool:
        """Count a step of `rows` requests, and whether it goes without drafts altogether.

        Few requests end the rest, since small batches draft best.
        """
        if self.quiet and rows <= self._quiet_rows // 2:
            self._quiet_until, self._rest = 0, _FIRST_REST
        self._steps += 1
        if self._steps == self._quiet_until:
            self._trial = _TRIAL
        return self._steps <= self._quiet_until

    def drafts(self, rows: int, sampled: int = 0) -> int:
        """How many drafts of each row are worth verifying in a step of `rows` requests: 0 to K.

        `sampled` of the requests have a temperature: their drafts cost more.
        """
        self._drawn = sampled / max(rows, 1)
        in_trial = self._trial > 0
        self._trial -= in_trial
        without = self._pass.at(rows)
        if not self._adaptive or not without or in_trial or self._looks_again:
            return self._most
        pays = timing.drafts_worth_verifying(
            self.reach(Source.CACHE), rows * self.hit_rate, rows, without, self._per_draft
        )
        self._in_vain = 0 if pays else self._in_vain + 1
        if self._in_vain >= _STEPS_BEFORE_QUIET:
            self._in_vain, self._quiet_rows = 0, rows
            self._quiet_until, self._rest = self._steps + self._rest, min(2 * self._rest, _LONGEST_REST)
        elif pays:
            self._rest = _FIRST_REST
        return pays

    def back_up(self, matches: Sequence[bool], hits: int, most: int) -> BackupChoice:
        """What the missed rows get: row i of them has an n-gram match or not; `hits` rows of the step have drafts."""
        first, step = self._jit_times()
        tries = self._mode == "auto" and self._looks_again and not any(matches)
        return backup.choose(
            "jit" if tries else self._mode,
            matches,
            hits,
            jit_reach=self.reach(Source.JIT)[: min(most, 1) if tries else most],
            ngram_reach=self.reach(Source.NGRAM)[:most],
            first=first,
            step=step,
            rate=self.rate,
            per_token=self._per_draft,
        )

    def more_depths(self, have: int, most: int, late: int) -> int:
        """How many more drafts to wait for in a step whose `late` rows that hit have `have` of them, of late tables."""
        if self._mode not in ("auto", "jit"):
            return 0
        known = self._late.at(1) > 0
        first, step = (self._late.at(1), self._late.per_unit) if known else (self._jit_times()[1],) * 2
        reach = [self._late_gain.value * chance for chance in self.reach(Source.CACHE)]
        more = backup.more_depths(reach, have, first, step, self.rate, self._per_draft, most, late)
        return max(more, min(self._looks_again, most - have))

    @property
    def _looks_again(self) -> bool:
        """Whether this step tries what does not seem to pay: what is known from trying alone would never change."""
        return self._adaptive and self._steps > 0 and self._steps % _LOOK_AGAIN == 0

    def patience(self, depth: int) -> float:
        """Seconds to wait for just-in-time drafts at most: no longer than a verify pass takes."""
        first, step = self._jit_times()
        usual = _PATIENCE * (first + step * depth)
        return min(usual, self.verify_pass) if usual else self.verify_pass

    @property
    def _per_draft(self) -> float:
        """Seconds that a draft adds to a pass like the one that is to come."""
        return self._pass.per_draft(self._drawn)

    @property
    def verify_pass(self) -> float:
        """Seconds that a verify pass of one token takes, but a millisecond at least."""
        return max(self._pass.at(1), 1e-3)

    def _jit_times(self) -> tuple[float, float]:
        """Seconds until the first just-in-time draft, and for each further one.

        Until they were measured: those of a round, whose steps are longer, as they are over all branches.
        """
        if self._jit_waits:
            return self._jit.at(1), self._jit.per_unit
        return 2 * self._draft_step.value, self._draft_step.value
