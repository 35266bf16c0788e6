"""The speed model: what speculation gains over plain decoding, from hit rate, tokens per round and times.

Times are in units of one verify pass of the target; tokens are per round, with the bonus token. SSD paper, Theorem 7
and its corollaries. Host overhead is in none of the formulas: count it to the pass it follows, or expect less.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import mul


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


def _check(hit_rate: float, *times: float) -> None:
    if not 0 <= hit_rate <= 1:
        raise ValueError(f"a hit rate lies between 0 and 1, not {hit_rate}")
    if min(times) < 0:
        raise ValueError(f"a time cannot be negative: {min(times)}")
