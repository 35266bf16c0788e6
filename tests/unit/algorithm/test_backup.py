from __future__ import annotations

from itertools import accumulate, product
from math import comb, inf
from operator import mul
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saguaro.algorithm.backup import BackupChoice, choose, critical_batch, jit_gain, more_depths, ngram_pays
from vllm_saguaro.algorithm.timing import speed_up_over_plain

rates = st.floats(0.0, 1.0)
seconds = st.floats(0.0, 0.2)
reaches = st.lists(rates, max_size=5).map(lambda chances: list(accumulate(chances, mul)))

# 100 tokens per second: 0.01 s cost a token
RATE = 100.0
REACH = [0.8, 0.6, 0.4, 0.2]


def test_critical_batch() -> None:
    # 1 + T (1 - p^b) = N_s / N_f: p^b = 1 - .25 / .5 = .5, so b = 1 at p = .5 and 2 at its root
    assert critical_batch(0.5, 2.5, 2.0, 0.5) == pytest.approx(1.0)
    assert critical_batch(0.5**0.5, 2.5, 2.0, 0.5) == pytest.approx(2.0)
    assert critical_batch(0.9, 3.0, 2.0, 0.5) == inf  # 1.5 times the tokens for at most 1.5 times the time
    assert critical_batch(0.9, 2.0, 2.0, 0.5) == 0  # no more tokens
    assert critical_batch(0.9, 1.5, 2.0, 0.0) == 0
    assert critical_batch(0.9, 2.5, 2.0, 0.0) == inf
    assert critical_batch(1.0, 2.1, 2.0, 0.5) == inf  # never a stall
    assert critical_batch(0.0, 2.1, 2.0, 0.5) == 0  # always a stall, of a fourth of a pass and more
    for wrong in ((1.1, 2.0, 1.0, 0.5), (0.5, 2.0, 1.0, -0.5), (0.5, 2.0, 0.0, 0.5)):
        with pytest.raises(ValueError, match="no hit rate"):
            critical_batch(*wrong)


def test_published_llama_backup_pays_for_less_than_one_row() -> None:
    """Hit rate .88, 5.68 tokens after a hit, 4.01 after a slow miss and 1 after a fast one, T about .8."""
    slow, fast = 0.88 * 5.68 + 0.12 * 4.01, 0.88 * 5.68 + 0.12 * 1
    assert critical_batch(0.88, slow, fast, 0.8) == pytest.approx(0.7, abs=0.05)


@settings(deadline=None)
@given(st.floats(0.05, 0.99), st.floats(0.05, 2.0), st.floats(0.02, 0.98), st.floats(1.0, 6.0))
def test_both_backups_are_equal_at_the_critical_batch(p: float, slow_time: float, part: float, fast: float) -> None:
    """With p^b for p in the time of a round (Corollary 16) the speed-ups cross at b*."""
    slow = fast * (1 + part * slow_time)
    critical = critical_batch(p, slow, fast, slow_time)

    def slow_speed_up(batch: float) -> float:
        return speed_up_over_plain(p**batch, slow, slow, primary=1.0, backup=slow_time)

    assert slow_speed_up(critical) == pytest.approx(fast)
    assert slow_speed_up(critical * 0.9) > fast > slow_speed_up(critical * 1.1)


def test_jit_gain() -> None:
    # Two rows: 2 * (.8 + .6) - 100 * (.004 + .002) - 100 * .001 * 2 * 2 = 2.8 - .6 - .4
    assert jit_gain(REACH, 0.004, 0.002, RATE, 0.001, missed=2, depth=2) == pytest.approx(1.8)
    assert jit_gain(REACH, 0.004, 0.002, RATE, 0.001, missed=2, depth=0) == 0


def test_more_depths() -> None:
    # A further draft costs .2 + .1 tokens: .3 of .4 is worth it, .3 of .2 is not
    assert more_depths(REACH, 0, 0.002, 0.002, RATE, 0.001, most=4) == 3
    assert more_depths(REACH, 0, 0.002, 0.002, RATE, 0.001, most=2) == 2
    assert more_depths(REACH, 2, 0.002, 0.002, RATE, 0.001, most=4) == 1
    assert more_depths(REACH, 3, 0.002, 0.002, RATE, 0.001, most=4) == 0
    # The first one is late: .9 + .1 is more than the .4 of one and less than the .6 of two, with .3 more for the second
    assert more_depths(REACH, 2, 0.009, 0.002, RATE, 0.001, most=4) == 0
    # Three late rows share the wait: .067 + .1 a row
    assert more_depths(REACH, 3, 0.002, 0.002, RATE, 0.001, most=4, late=3) == 1
    assert more_depths(REACH, 3, 0.009, 0.002, RATE, 0.001, most=4, late=3) == 0
    assert more_depths([], 0, 0.0, 0.0, RATE, 0.0, most=4) == 0
    assert more_depths(REACH, 4, 0.0, 0.0, RATE, 0.0, most=4) == 0


@settings(deadline=None)
@given(
    reaches, seconds, seconds, st.floats(0.0, 50.0), seconds, st.integers(0, 4), st.integers(1, 8), st.integers(0, 6)
)
def test_more_depths_are_the_best(
    reach: list[float], first: float, step: float, rate: float, per_token: float, have: int, late: int, most: int
) -> None:
    def gain(w: int) -> float:
        wait = first + step * (w - 1) if w else 0.0
        return late * sum(reach[have : have + w]) - rate * (wait + per_token * late * w)

    chosen = more_depths(reach, have, first, step, rate, per_token, most, late)
    depths = range(len(reach[have:most]) + 1)
    assert gain(chosen) >= max(gain(w) for w in depths) - 1e-9
    assert all(gain(w) < gain(chosen) for w in range(chosen))


def stalling_gain(batch: int, p: float, reach: list[float], drafting: float, tokens_hit: float) -> float:
    """Mean net tokens per round of waiting whenever any row missed; times in verify passes, hits independent."""
    rate = batch * (p * tokens_hit + (1 - p) * 1.0)  # of an engine whose backup is the fast one
    gains = [
        jit_gain(reach, drafting, 0.0, rate, 0.0, missed=m, depth=len(reach)) if m else 0.0 for m in range(batch + 1)
    ]
    return sum(comb(batch, m) * (1 - p) ** m * p ** (batch - m) * gain for m, gain in enumerate(gains))


@settings(deadline=None)
@given(st.floats(0.3, 0.98), st.floats(0.05, 1.0), reaches.filter(lambda reach: sum(reach) > 0.1))
def test_the_gain_of_a_stall_changes_sign_at_the_critical_batch(p: float, drafting: float, reach: list[float]) -> None:
    """Theorem 17 is this marginal rule, averaged over the number of misses."""
    tokens_hit = 4.0
    fast = p * tokens_hit + (1 - p)
    slow = fast + (1 - p) * sum(reach)
    critical = critical_batch(p, slow, fast, drafting)
    for batch in range(1, 25):
        if batch < critical - 1e-3:
            assert stalling_gain(batch, p, reach, drafting, tokens_hit) > 0
        elif batch > critical + 1e-3:
            assert stalling_gain(batch, p, reach, drafting, tokens_hit) < 0


def test_the_sign_does_change_within_small_batches() -> None:
    reach = [0.9, 0.8, 0.7]
    gains = [stalling_gain(batch, 0.9, reach, 0.3, tokens_hit=4.0) for batch in range(1, 6)]
    critical = critical_batch(0.9, 3.7 + 0.1 * 2.4, 3.7, 0.3)
    assert 2 < critical < 3
    assert [gain > 0 for gain in gains] == [True, True, False, False, False]


def test_ngram_pays() -> None:
    assert ngram_pays(REACH, RATE, 0.003) == 3  # a token costs .3
    assert ngram_pays(REACH, RATE, 0.009) == 0
    assert ngram_pays(REACH, RATE, 0.0) == 4
    assert ngram_pays([0.5, 0.5], 100.0, 0.005) == 0  # equals: nothing
    assert ngram_pays([], RATE, 0.0) == 0


@settings(deadline=None)
@given(reaches, st.floats(0.0, 50.0), seconds)
def test_ngram_pays_is_the_best(reach: list[float], rate: float, per_token: float) -> None:
    chosen = ngram_pays(reach, rate, per_token)
    # Reach falls, so the marginal rule says the same: as long as the next token is worth more than it costs
    assert all(value > rate * per_token - 1e-9 for value in reach[:chosen])
    assert all(value <= rate * per_token + 1e-9 for value in reach[chosen:])


# A row gains .8 + .6 - 2 * .1 from two drafts, .5 + .3 - 2 * .1 from two guessed tokens
COSTS: dict[str, Any] = {
    "jit_reach": [0.8, 0.6],
    "ngram_reach": [0.5, 0.3, 0.05],
    "first": 0.004,
    "step": 0.001,
    "rate": RATE,
    "per_token": 0.001,
}


def test_choose_by_net_tokens() -> None:
    # Waiting costs .5 tokens and adds 1.2 in a row without a match, .6 in one with
    assert choose("auto", [False], 0, **COSTS) == BackupChoice(("jit",), jit_drafts=2)
    assert choose("auto", [True], 0, **COSTS) == BackupChoice(("jit",), jit_drafts=2)
    slower = COSTS | {"first": 0.006}
    assert choose("auto", [True], 0, **slower) == BackupChoice(("ngram",), ngram_tokens=2)  # .7 for .6
    # Two rows pay one wait
    assert choose("auto", [True, True], 0, **slower) == BackupChoice(("jit", "jit"), jit_drafts=2)
    # Nothing is worth it at 20 times the rate of tokens
    assert choose("auto", [True, False], 0, **(COSTS | {"rate": 2000.0})) == BackupChoice(("none", "none"))
    # A good n-gram is kept although the others wait
    good = COSTS | {"ngram_reach": [0.95, 0.9, 0.85]}
    assert choose("auto", [True, False], 0, **good) == BackupChoice(("ngram", "jit"), ngram_tokens=3, jit_drafts=2)
    assert choose("auto", [], 3, **COSTS) == BackupChoice(())
    assert choose("auto", [], 0, **COSTS) == BackupChoice(())
    assert choose("jit", [], 0, **COSTS) == BackupChoice(())


@pytest.mark.parametrize("mode", ["auto", "jit"])
def test_no_row_that_hit_waits(mode: Any) -> None:
    free = COSTS | {"first": 0.0, "step": 0.0}
    assert choose(mode, [False, False], 0, **free).rows == ("jit", "jit")
    assert choose(mode, [False, False], 1, **free) == BackupChoice(("none", "none"))


def test_an_ngram_guess_delays_nobody() -> None:
    assert choose("auto", [False, True], 5, **COSTS) == BackupChoice(("none", "ngram"), ngram_tokens=2)


def test_a_forced_mode_asks_no_estimate() -> None:
    dear = COSTS | {"rate": 1e6}
    assert choose("none", [True, False], 0, **dear) == BackupChoice(("none", "none"))
    assert choose("none", [True, False], 0, **COSTS) == BackupChoice(("none", "none"))
    assert choose("ngram", [True, False], 0, **dear) == BackupChoice(("ngram", "none"), ngram_tokens=3)
    assert choose("ngram", [True, False], 2, **dear) == BackupChoice(("ngram", "none"), ngram_tokens=3)
    assert choose("jit", [True, False], 0, **dear) == BackupChoice(("jit", "jit"), jit_drafts=2)
    with pytest.raises(ValueError, match="one of auto, none, ngram, jit, not 'fast'"):
        choose("fast", [True], 0, **COSTS)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.lists(st.booleans(), max_size=4),
    st.integers(0, 2),
    reaches,
    reaches,
    seconds,
    seconds,
    st.floats(0.0, 50.0),
    st.floats(0.0, 0.02),
)
def test_choose_is_the_best_assignment(
    matches: list[bool],
    hits: int,
    jit_reach: list[float],
    ngram_reach: list[float],
    first: float,
    step: float,
    rate: float,
    per_token: float,
) -> None:
    def net(choice: BackupChoice) -> float:
        gain = 0.0
        for kind in choice.rows:
            if kind == "jit":
                gain += sum(jit_reach[: choice.jit_drafts]) - rate * per_token * choice.jit_drafts
            elif kind == "ngram":
                gain += sum(ngram_reach[: choice.ngram_tokens]) - rate * per_token * choice.ngram_tokens
        return gain - (rate * (first + step * (choice.jit_drafts - 1)) if "jit" in choice.rows else 0.0)

    chosen = choose(
        "auto",
        matches,
        hits,
        jit_reach=jit_reach,
        ngram_reach=ngram_reach,
        first=first,
        step=step,
        rate=rate,
        per_token=per_token,
    )
    assert len(chosen.rows) == len(matches)
    assert all(match or kind != "ngram" for match, kind in zip(matches, chosen.rows, strict=True))
    assert not (hits and "jit" in chosen.rows)
    assert (chosen.jit_drafts > 0, chosen.ngram_tokens > 0) == ("jit" in chosen.rows, "ngram" in chosen.rows)

    best = 0.0
    depths = range(1, len(jit_reach) + 1) if hits == 0 and jit_reach else [0]
    for depth, tokens in product(depths, range(len(ngram_reach) + 1)):
        jit: tuple[Any, ...] = ("jit",) if depth else ()
        ngram: tuple[Any, ...] = ("ngram",) if tokens else ()
        for rows in product(*(("none", *jit, *ngram) if match else ("none", *jit) for match in matches)):
            best = max(best, net(BackupChoice(rows, tokens, depth)))
    assert net(chosen) == pytest.approx(best, abs=1e-9)
