"""What a missed row gets: nothing, an n-gram guess or just-in-time drafts. SSD paper, section 4.3.

The paper stalls the batch as a whole if any row missed, and so asks up to which batch size a slow backup pays
(Corollary 16, Theorem 17: `critical_batch`). Here a backup never delays a row that hit, so the question is asked per
step: are the tokens that a backup adds worth those that the engine could make in the seconds it costs? Averaged over
independent hits, for a batch that does stall, this changes sign at the paper's b*.

A gain is in tokens: those expected to be accepted, less `rate` times the seconds they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Literal, get_args

from vllm_saguaro.algorithm.timing import first_best

Backup = Literal["none", "ngram", "jit"]
BackupMode = Literal["auto", "none", "ngram", "jit"]


def critical_batch(hit_rate: float, tokens_slow: float, tokens_fast: float, slow_time: float) -> float:
    """b*, the batch size below which the slow backup is the better one, for a batch that stalls as a whole.

    N_s / (1 + T (1 - p^b)) = N_f  at  b* = ln(1 - (N_s / N_f - 1) / T) / ln p

    `tokens_slow` and `tokens_fast` are the mean tokens per row and round (N_s, N_f) with either backup, over hits and
    misses; `slow_time` is T in verify passes, the fast one takes no time; p is the chance of a row to hit. inf: the
    slow one always pays; 0: it never does. Raises ValueError if p is no probability, T is negative or N_f is not
    positive.
    """
    if not 0 <= hit_rate <= 1 or slow_time < 0 or tokens_fast <= 0:
        raise ValueError(f"no hit rate, time and tokens: {hit_rate}, {slow_time}, {tokens_fast}")
    gain = tokens_slow / tokens_fast - 1
    if gain <= 0:
        return 0.0
    if hit_rate == 1 or gain >= slow_time:
        return inf  # never a stall, or a stall in every round is still paid for
    return log(1 - gain / slow_time) / log(hit_rate) if hit_rate > 0 else 0.0


def jit_gain(
    reach: Sequence[float], first: float, step: float, rate: float, per_token: float, missed: int, depth: int
) -> float:
    """Net tokens if the step waits until each of `missed` rows has `depth` drafts, decoded for it after the miss.

    m sum_{j <= w} reach_j - rate (first + (w - 1) step) - rate per_token m w, and 0 at w = 0

    `reach[j - 1]` is the chance that at least j of these drafts are accepted, `first` the seconds until the first of
    them is there, `step` until each further one, `per_token` what each adds to the verify pass, `rate` the tokens per
    second of the engine as it is.
    """
    if depth == 0:
        return 0.0
    accepted = sum(reach[:depth])
    return missed * (accepted - rate * per_token * depth) - rate * (first + step * (depth - 1))


def more_depths(
    reach: Sequence[float],
    have: int,
    first: float,
    step: float,
    rate: float,
    per_token: float,
    most: int,
    late: int = 1,
) -> int:
    """How many more drafts to wait for where a late table has `have` of them, up to `most` in all: the fewer of equals.

    m sum_{have < j <= have + w} reach_j - rate (first + (w - 1) step + per_token m w), 0 at w = 0, for a step of which
    the m = `late` rows that hit are all late. Their outcomes known, the draft side goes on with their branches alone:
    `first` seconds until one more draft, `step` for each further one.
    """
    return first_best(
        [
            jit_gain(reach[have:most], first, step, rate, per_token, missed=late, depth=w)
            for w in range(len(reach[have:most]) + 1)
        ]
    )


def ngram_pays(reach: Sequence[float], rate: float, per_token: float) -> int:
    """How many tokens of an n-gram guess are worth verifying, 0 to len(reach): the fewer of equals.

    sum_{j <= n} reach_j - rate per_token n. The guess itself takes no time.
    """
    return first_best([_net(reach, rate, per_token, n) for n in range(len(reach) + 1)])


@dataclass(frozen=True)
class BackupChoice:
    """What the missed rows of one step get: one entry per missed row, in their order.

    `ngram_tokens` is how many tokens to guess in rows with "ngram", `jit_drafts` how many drafts to wait for in rows
    with "jit"; each is 0 if no row has that backup.
    """

    rows: tuple[Backup, ...]
    ngram_tokens: int = 0
    jit_drafts: int = 0


def choose(
    mode: BackupMode,
    matches: Sequence[bool],
    hits: int,
    *,
    jit_reach: Sequence[float],
    ngram_reach: Sequence[float],
    first: float,
    step: float,
    rate: float,
    per_token: float,
) -> BackupChoice:
    """What each missed row gets in a step where `hits` rows hit and row i of the missed has an n-gram match or not.

    "auto" takes what adds the most net tokens, the cheaper of equals; waiting for just-in-time drafts is paid once for
    all rows. The other modes ask no estimate: "ngram" guesses len(ngram_reach) tokens in each row with a match, "jit"
    waits for len(jit_reach) drafts. In no mode does a row wait for another's drafts: "jit" is not for a step with hits.
    The times and reaches are those of `jit_gain` and `ngram_pays`. Raises ValueError if the mode is none of these.
    """
    if mode not in get_args(BackupMode):
        raise ValueError(f"a backup is one of {', '.join(get_args(BackupMode))}, not {mode!r}")
    most = len(jit_reach) if hits == 0 and mode in ("auto", "jit") else 0
    if mode != "auto":
        guessed = len(ngram_reach) if mode == "ngram" else 0
        return _assigned(matches, guessed, most, ngram_gain=0.0, jit_row_gain=1.0)

    guessed = ngram_pays(ngram_reach, rate, per_token)
    ngram_gain = _net(ngram_reach, rate, per_token, guessed)

    def gain(depth: int) -> float:
        # sum over the rows of the better of n-gram and jit, less what all wait
        waiting = jit_gain(jit_reach, first, step, rate, per_token, missed=0, depth=depth)
        jit = _net(jit_reach, rate, per_token, depth)
        return waiting + sum(max(jit, ngram_gain if match else 0.0, 0.0) for match in matches)

    depth = first_best([gain(w) for w in range(most + 1)])
    return _assigned(matches, guessed, depth, ngram_gain, jit_row_gain=_net(jit_reach, rate, per_token, depth))


def _assigned(
    matches: Sequence[bool], guessed: int, depth: int, ngram_gain: float, jit_row_gain: float
) -> BackupChoice:
    """Each row's better one of `guessed` n-gram tokens and `depth` drafts, given what a row gains from either."""

    def backup(match: bool) -> Backup:
        ngram = match and guessed > 0
        if depth > 0 and jit_row_gain > (ngram_gain if ngram else 0.0):
            return "jit"
        return "ngram" if ngram else "none"

    rows = tuple(backup(match) for match in matches)
    return BackupChoice(rows, guessed if "ngram" in rows else 0, depth if "jit" in rows else 0)


def _net(reach: Sequence[float], rate: float, per_token: float, num_tokens: int) -> float:
    """Tokens accepted of `num_tokens`, less what verifying them costs; 0 for none."""
    return sum(reach[:num_tokens]) - rate * per_token * num_tokens
