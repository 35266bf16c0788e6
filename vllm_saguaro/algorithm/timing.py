"""The speed model: what speculation gains over plain decoding, and the choice of K and N from measured times.

The gains are in units of one verify pass of the target; tokens are per round, with the bonus token. SSD paper, Theorem
7 and its corollaries. Host overhead is in none of the formulas: count it to the pass it follows, or expect less. The
choices take seconds, and what they are made from is measured while serving (`measured.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

SLACK = 0.95
"""Share of the time until the next outcome that is planned with."""
PATIENCE = 1.25
"""Where an outcome has not come after so many times what it usually takes, this pass is not like those before."""
_SAME = 1e-12  # relative: a smaller difference of two values is rounding


def expected_tokens(acceptances: Iterable[float]) -> float:
    """E = 1 + a_1 + a_1 a_2 + ...: tokens per round when draft j is accepted with chance a_j once those before it are.

    No drafts: 1, the token that the target gives by itself.
    """
    return 1.0 + sum(accumulate(acceptances, mul))


def speed_up_over_plain(hit_rate: float, tokens_hit: float, tokens_miss: float, primary: float, backup: float) -> float:
    """S, the speed-up of Saguaro over plain decoding (Theorem 7).

    S = [p E_hit + (1 - p) E_miss] / [p max(1, T_p) + (1 - p) (1 + T_b)]

    After a hit a round costs the longer of verifying and drafting for the next (`primary`, T_p: glue and K decode steps
    of all branches), after a miss the pass and the backup before it (`backup`, T_b). A miss served without drafts has
    T_b = 0 and E_miss = 1.
    """
    _check(hit_rate, primary, backup)
    tokens = hit_rate * tokens_hit + (1 - hit_rate) * tokens_miss
    time = hit_rate * max(1.0, primary) + (1 - hit_rate) * (1 + backup)
    return tokens / time


def speed_up_of_plain_speculation(tokens: float, drafting: float) -> float:
    """E / (1 + T_SD): ordinary speculative decoding, which drafts and then verifies, over plain decoding."""
    _check(1.0, drafting)
    return tokens / (1 + drafting)


def ideal_ratio(
    drafting: float,
    *,
    hit_rate: float = 1.0,
    primary: float | None = None,
    backup: float | None = None,
    tokens_hit: float = 1.0,
    tokens_miss: float = 1.0,
    tokens: float = 1.0,
) -> float:
    """Saguaro over ordinary speculation, S / (E_SD / (1 + T_SD)), where nothing but the model's own times counts.

    `drafting` alone (T_SD, the cost ratio c) gives the most that can be had: every round a hit, its branches drafted as
    fast as ordinary drafting does, the same tokens per round. That is (1 + c) / max(1, c): 1 at c = 0, 2 at c = 1,
    falling beyond, where the target waits. `primary` and `backup` are T_p and T_b, `drafting` unless given.
    `tokens_hit` and `tokens_miss` are E_hit and E_miss, `tokens` is E_SD; only their ratios matter.
    """
    saguaro = speed_up_over_plain(
        hit_rate,
        tokens_hit,
        tokens_miss,
        primary=drafting if primary is None else primary,
        backup=drafting if backup is None else backup,
    )
    return saguaro / speed_up_of_plain_speculation(tokens, drafting)


@dataclass(frozen=True)
class DraftTimes:
    """What a draft round costs, in seconds (or any unit, if it is the same everywhere).

    `glue` is the time from the outcome to the first decode step of the branches: service, extend, fork. A decode step
    over R rows takes step_base + step_per_row * R; what the host adds to each step belongs in `step_base`.

    Raises ValueError if a time is negative.
    """

    glue: float
    step_base: float
    step_per_row: float = 0.0

    def __post_init__(self) -> None:
        _check(1.0, self.glue, self.step_base, self.step_per_row)

    def step(self, rows: int) -> float:
        """The time of one decode step over `rows` rows, branches times requests."""
        return self.step_base + self.step_per_row * rows


def depth_in_time(times: DraftTimes, rows: int, available: float, most: int) -> int:
    """How many depths are published `available` seconds after the draft side got its outcome: 0 to `most`.

    A table is readable at every depth, so one that is late serves these.
    """
    left = available - times.glue
    # floor(left / step), where d steps that take exactly what is left count as d in spite of rounding
    step = times.step(rows)
    if step * most <= left * (1 + _SAME):
        return most
    return min(most, int(left / step * (1 + _SAME))) if left > 0 else 0


def comes_too_late(step: float, expected: float, elapsed: float) -> bool:
    """Whether a decode step of the branches would still be under way when the next outcome comes.

    Nothing breaks a forward off. Such a step is too late for the outcome that it is for, and in the way of the round
    that this outcome begins: without it a round begins with its outcome, and is as deep as `depth_in_time` says.

    elapsed + step > expected, where `expected` is the time from one outcome to the next and `elapsed` what of it
    is gone; all in seconds. False once the outcome is long overdue, and where nothing is expected (0). No slack: a step
    that ends just when the outcome comes is in time every other time, and else in the way for a moment alone.
    """
    return expected - step < elapsed < PATIENCE * expected


def best_branches(
    times: DraftTimes,
    available: float,
    batch: int,
    most_depth: int,
    reach: Sequence[float],
    hit_rate: Callable[[int], float] | Mapping[int, float],
    choices: Sequence[int],
) -> int:
    """N of `choices` with the most accepted drafts per request and round; the smaller one of equals.

    More branches hit more often and take longer steps, so that fewer depths are there in time. `reach[j - 1]` is the
    chance that at least j drafts are accepted after a hit, `hit_rate` of N the chance of a hit, `available` the seconds
    from one outcome to the next. Raises ValueError if there is nothing to choose from.
    """
    rate = hit_rate.__getitem__ if isinstance(hit_rate, Mapping) else hit_rate

    def accepted(branches: int) -> float:
        # hit(N) * sum_{j <= d(N)} reach_j
        return rate(branches) * sum(reach[: depth_in_time(times, branches * batch, available, most_depth)])

    ordered = sorted(choices)
    return ordered[first_best([accepted(n) for n in ordered])]


def rate_when_waiting(
    num_drafts: int,
    verify: Callable[[int], float],
    times: DraftTimes,
    rows: int,
    reach: Sequence[float],
    *,
    service: float = 0.0,
    hit_rate: float = 1.0,
) -> float:
    """Tokens per second and request of an engine that waits for the whole table, as the paper's does.

    [p (1 + sum_{j <= K} reach_j) + 1 - p] / max(verify(K), service + glue + K step(rows))

    `verify` of K is the target's own part of a round with K drafts, host work included; `service` is the look-up and
    the reply. A missed round has no drafts and waits all the same, since nothing interrupts the table. K = 0 is plain
    decoding, which waits for nobody. Raises ValueError if a round takes no time.
    """
    _check(hit_rate, service)
    drafting = service + times.glue + num_drafts * times.step(rows) if num_drafts else 0.0
    seconds = max(verify(num_drafts), drafting)
    if seconds <= 0:
        raise ValueError(f"a round with {num_drafts} drafts must take some time, not {seconds}")
    return (1 + hit_rate * sum(reach[:num_drafts])) / seconds


def best_lookahead(
    verify: Callable[[int], float],
    times: DraftTimes,
    rows: int,
    reach: Sequence[float],
    *,
    service: float = 0.0,
    hit_rate: float = 1.0,
    choices: Sequence[int] | None = None,
) -> int:
    """K with the highest `rate_when_waiting`, of `choices` or of 0..len(reach); the smaller one of equals.

    Raises ValueError if a choice lies outside of what `reach` covers, or there is none.
    """
    ordered = range(len(reach) + 1) if choices is None else sorted(choices)
    if any(not 0 <= k <= len(reach) for k in ordered):
        raise ValueError(f"acceptance is known for up to {len(reach)} drafts, not for all of {list(ordered)}")
    rates = [rate_when_waiting(k, verify, times, rows, reach, service=service, hit_rate=hit_rate) for k in ordered]
    return ordered[first_best(rates)]


def drafts_worth_verifying(reach: Sequence[float], rows_hit: float, rows: int, without: float, per_draft: float) -> int:
    """K in 0..len(reach) with the most tokens per second for a batch, the smaller one of equals; 0: go quiet.

    [rows + rows_hit sum_{j <= K} reach_j] / [without + per_draft rows_hit K]

    `rows` requests are in the step, `rows_hit` of them (as many as one expects) bring K drafts, a pass of the target
    takes `without` seconds where none has drafts, and each draft `per_draft` more. Raises ValueError if a time is
    negative or a step takes none.
    """
    _check(1.0, without, per_draft)
    if without <= 0:
        raise ValueError("a step must take some time")
    accepted = [0.0, *accumulate(reach)]
    tokens = [rows + rows_hit * a for a in accepted]
    seconds = [without + per_draft * rows_hit * k for k in range(len(accepted))]
    return first_best([n / t for n, t in zip(tokens, seconds, strict=True)])


def first_best(values: Sequence[float]) -> int:
    """The index of the first value that is the greatest, where a difference that is rounding alone does not count.

    Raises ValueError if there are no values.
    """
    slack = _SAME * max(abs(v) for v in values)
    best = max(values)
    return next(i for i, v in enumerate(values) if v >= best - slack)


def _check(hit_rate: float, *times: float) -> None:
    if not 0 <= hit_rate <= 1:
        raise ValueError(f"a hit rate lies between 0 and 1, not {hit_rate}")
    if min(times) < 0:
        raise ValueError(f"a time cannot be negative: {min(times)}")
