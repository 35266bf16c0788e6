from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saguaro.algorithm.verify_time import VerifyTime

BASE, PER_ROW, PER_DRAFT = 0.007, 0.0008, 0.0003
"""Seconds; `PER_ROW` with the token that every request has."""
Pass = tuple[int, int]


def seconds_of(rows: float, drafts: float) -> float:
    return BASE + PER_ROW * rows + PER_DRAFT * drafts


def fed(
    time: VerifyTime, passes: Iterable[Pass], seconds: Callable[[float, float], float] = seconds_of, seed: int = 0
) -> VerifyTime:
    """`time` after these passes, with five per cent of noise."""
    draw = random.Random(seed)
    for rows, drafts in passes:
        time.observe(rows, drafts, 0, seconds(rows, drafts) * draw.gauss(1, 0.05))
    return time


def waves(steps: int, every: int) -> list[Pass]:
    """Batches that become smaller as their requests end, with drafts in one pass of so many."""
    sizes = [64, 60, 48, 33, 16, 15, 9, 4, 2, 1]
    return [(sizes[i // 8 % 10], 3 * sizes[i // 8 % 10] if i % every == 0 else 0) for i in range(steps)]


def test_before_anything_is_observed_it_is_the_prior() -> None:
    time = VerifyTime(0.2, 0.01)
    assert (time.at(4, 6), time.at(10), time.per_draft()) == (pytest.approx(0.3), pytest.approx(0.3), 0.01)
    time.observe(4, 6, 0, 0.5)
    assert (time.at(4, 6), time.at(4, 16)) == (pytest.approx(0.5), pytest.approx(0.6))
    # Below what the prior's slope alone would take: through the origin
    fast = VerifyTime(0.2, 0.01)
    fast.observe(4, 6, 0, 0.05)
    assert (fast.at(0), fast.per_draft()) == (0.0, pytest.approx(0.005))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: VerifyTime(-0.1, 0.0), "prior is negative"),
        (lambda: VerifyTime(0.1, 0.0, prior_weight=0.0), "must have some weight"),
        (lambda: VerifyTime(0.1, 0.0, decay=0.0), "decay lies above 0"),
        (lambda: VerifyTime(0.1, 0.0).observe(-1, 0, 0, 0.5), "are negative"),
        (lambda: VerifyTime(0.1, 0.0).observe(1, 0, 0, -0.5), "are negative"),
        (lambda: VerifyTime(0.1, 0.0).observe(1, 0, 0, math.inf), "finite"),
    ],
)
def test_what_cannot_be_is_an_error(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_without_forgetting_it_is_the_plane_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_saguaro.algorithm.verify_time._OWN_WEIGHT", 1e-9)
    time = VerifyTime(0.0, 0.0, prior_weight=1e-9, decay=1.0, clip=math.inf)
    draw = random.Random(3)
    sizes = [(draw.randint(1, 64), draw.randint(0, 200)) for _ in range(60)]
    times = [seconds_of(*size) * draw.uniform(0.9, 1.1) for size in sizes]
    for (rows, drafts), seconds in zip(sizes, times, strict=True):
        time.observe(rows, drafts, 0, seconds)
    wanted = np.linalg.lstsq(np.array([(1, rows, drafts) for rows, drafts in sizes]), np.array(times), rcond=None)[0]
    found = time.at(0), time.at(1) - time.at(0), time.per_draft()
    assert found == pytest.approx(tuple(wanted), rel=1e-5)


def test_what_requests_cost_is_not_taken_for_what_drafts_cost() -> None:
    time = fed(VerifyTime(0.0, 0.0), waves(640, every=32))
    assert time.per_draft() == pytest.approx(PER_DRAFT, rel=0.15)
    for rows in (1, 16, 64):
        assert time.at(rows) == pytest.approx(seconds_of(rows, 0), rel=0.1)


def test_drafts_that_were_never_seen_are_taken_to_cost_what_requests_do() -> None:
    time = fed(VerifyTime(0.0, 0.0), ((rows, 0) for rows, _ in waves(640, every=1)))
    assert time.per_draft() == pytest.approx(PER_ROW, rel=0.1)


def test_drafts_that_every_request_has_cost_their_share() -> None:
    """Nothing tells the one from the other: what both cost together holds."""
    time = fed(VerifyTime(0.0, 0.0), waves(640, every=1))
    for rows in (1, 16, 64):
        assert time.at(rows, 3 * rows) == pytest.approx(seconds_of(rows, 3 * rows), rel=0.1)
    assert PER_DRAFT < time.per_draft() < PER_ROW


@pytest.mark.parametrize("quiet", [[(64, 0)], [(rows, 0) for rows in range(1, 65)], [(16, 48), (16, 0)]])
def test_passes_that_tell_nothing_of_something_do_not_unlearn_it(quiet: list[Pass]) -> None:
    time = fed(VerifyTime(0.0, 0.0), waves(640, every=4))
    fed(time, (quiet[i % len(quiet)] for i in range(3000)), seed=1)
    assert time.per_draft() == pytest.approx(PER_DRAFT, rel=0.2)
    assert time.at(32) == pytest.approx(seconds_of(32, 0), rel=0.15)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    time = fed(VerifyTime(0.0, 0.0), waves(640, every=4))
    fed(time, waves(640, every=4), lambda rows, drafts: 3 * seconds_of(rows, drafts), seed=1)
    assert time.per_draft() == pytest.approx(3 * PER_DRAFT, rel=0.2)
    assert time.at(64) == pytest.approx(3 * seconds_of(64, 0), rel=0.15)


@pytest.mark.parametrize("clip", [4.0, math.inf])
def test_a_hiccup_does_not_spoil_it(clip: float) -> None:
    time = fed(VerifyTime(0.0, 0.0, clip=clip), waves(640, every=4))
    before = time.at(64, 192)
    time.observe(64, 192, 0, 5.0)
    changed = abs(time.at(64, 192) / before - 1)
    assert changed < 0.1 if clip == 4 else changed > 0.5


def sampled_and_greedy(steps: int, seed: int = 0) -> VerifyTime:
    """Turns of sixty passes: greedy requests, and such as sample, whose drafts cost three times as much."""
    time, draw = VerifyTime(0.0, 0.0), random.Random(seed)
    for i in range(steps):
        rows, sampled = (64, 60, 48, 33, 16)[i // 12 % 5], i // 60 % 2 == 1
        drafts = (0, rows, 2 * rows)[i % 3]
        seconds = seconds_of(rows, drafts) + 2 * PER_DRAFT * drafts * sampled
        time.observe(rows, drafts, drafts * sampled, seconds * draw.gauss(1, 0.05))
    return time


@pytest.mark.parametrize("steps", [1200, 1260])
def test_drafts_of_requests_that_sample_have_a_cost_of_their_own(steps: int) -> None:
    """In either turn both are known."""
    time = sampled_and_greedy(steps)
    assert time.per_draft() == pytest.approx(PER_DRAFT, rel=0.25)
    assert time.per_draft(1.0) == pytest.approx(3 * PER_DRAFT, rel=0.15)
    assert time.per_draft(0.5) == pytest.approx(2 * PER_DRAFT, rel=0.15)
    assert time.at(64, 64, 64) == pytest.approx(seconds_of(64, 3 * 64), rel=0.1)


def test_what_would_be_negative_is_left_out_and_the_rest_fitted_anew() -> None:
    """Requests that cost less than drafts cannot be: the best line over all tokens is what is left."""
    time, draw = VerifyTime(0.0, 0.0, decay=1.0, clip=math.inf), random.Random(4)
    tokens, times = [], []
    for _ in range(200):
        rows, drafts = draw.randint(1, 64), draw.randint(0, 128)
        seconds = 0.05 + 0.0002 * rows + 0.001 * drafts
        tokens.append(rows + drafts)
        times.append(seconds)
        time.observe(rows, drafts, 0, seconds)
    slope, base = np.polyfit(tokens, times, 1)
    assert (time.at(0), time.at(1) - time.at(0), time.per_draft()) == pytest.approx((base, slope, slope), rel=1e-2)


@settings(deadline=None)
@given(
    st.lists(st.tuples(*(st.integers(0, most) for most in (256, 1024, 1024)), st.floats(0, 10)), max_size=40),
    st.floats(0, 3),
    st.floats(0, 3),
)
def test_no_part_of_it_is_negative_and_it_never_fails(
    passes: list[tuple[int, int, int, float]], base: float, per_token: float
) -> None:
    time = VerifyTime(base, per_token)
    for rows, drafts, drawn, seconds in passes:
        time.observe(rows, drafts, drawn, seconds)
        assert math.isfinite(time.at(64, 256, 256))
        assert 0 <= time.per_draft() <= time.per_draft(1.0)
        assert 0 <= time.at(0) <= time.at(1) <= time.at(1, 1) <= time.at(1, 1, 1)
