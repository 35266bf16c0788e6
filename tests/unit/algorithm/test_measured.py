from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saguaro.algorithm.measured import LinearTime, Mean

rates = st.floats(0.0, 1.0)
times = st.floats(0.0, 3.0)


def test_a_mean_starts_at_its_prior_and_forgets() -> None:
    mean = Mean(prior=0.8, prior_weight=2.0, decay=0.5)
    assert (mean.value, mean.count) == (0.8, 0)
    mean.observe(0.0)
    assert (mean.value, mean.count) == (0.8 / 2, 1)  # the prior weighs 2 * .5 now
    mean.observe(1.0)
    assert (mean.value, mean.count) == pytest.approx(((0.25 * 1.6 + 0.5 * 0 + 1) / (0.5 + 1.5), 1.5))
    for _ in range(60):
        mean.observe(0.3)
    assert (mean.value, mean.count) == pytest.approx((0.3, 2.0))
    with pytest.raises(ValueError, match="decay"):
        Mean(0.5, decay=0.0)
    with pytest.raises(ValueError, match="weight"):
        Mean(0.5, prior_weight=0.0)
    with pytest.raises(ValueError, match="negative"):
        mean.observe(0.5, weight=-1)


@settings(deadline=None)
@given(st.integers(0, 6), rates, st.floats(0.1, 1.0))
def test_a_weight_is_so_many_observations(weight: int, value: float, decay: float) -> None:
    one_by_one, at_once = Mean(0.5, decay=decay), Mean(0.5, decay=decay)
    for mean in (one_by_one, at_once):
        mean.observe(0.9)
    for _ in range(weight):
        one_by_one.observe(value)
    at_once.observe(value, weight)
    assert (at_once.value, at_once.count) == pytest.approx((one_by_one.value, one_by_one.count))


def fed(line: LinearTime, num: int, seconds: Callable[[float], float], sizes: list[float], seed: int = 0) -> LinearTime:
    """`line` after `num` passes of sizes drawn from `sizes`, with five per cent of noise on the time."""
    draw = random.Random(seed)
    for _ in range(num):
        size = draw.choice(sizes)
        line.observe(size, seconds(size) * draw.gauss(1, 0.05))
    return line


SIZES = [1.0, 5.0, 9.0, 40.0]


def two_tenths_and_a_hundredth(size: float) -> float:
    return 0.2 + 0.01 * size


def test_a_line_with_one_observation_or_none() -> None:
    line = LinearTime(0.2, 0.01)
    assert (line.base, line.per_unit, line.at(10)) == (0.2, 0.01, pytest.approx(0.3))
    line.observe(10, 0.5)
    assert (line.at(10), line.at(20)) == (pytest.approx(0.5), pytest.approx(0.6))
    # Below what the prior's slope alone would take: through the origin
    fast = LinearTime(0.2, 0.01)
    fast.observe(10, 0.05)
    assert (fast.base, fast.per_unit) == (0.0, pytest.approx(0.005))
    for wrong in ((-1.0, 0.5), (1.0, -0.5)):
        with pytest.raises(ValueError, match="negative"):
            line.observe(*wrong)
    with pytest.raises(ValueError, match="finite"):
        line.observe(1.0, math.inf)
    with pytest.raises(ValueError, match="negative"):
        LinearTime(-0.1, 0.0)
    with pytest.raises(ValueError, match="prior"):
        LinearTime(0.1, 0.0, prior_weight=0.0)


def test_without_forgetting_it_is_the_least_squares_line() -> None:
    line = LinearTime(0.0, 0.0, prior_weight=1e-9, decay=1.0, clip=math.inf)
    draw = random.Random(3)
    xs = [draw.uniform(1, 40) for _ in range(50)]
    ts = [0.2 + 0.01 * x + draw.uniform(0, 0.1) for x in xs]
    for x, t in zip(xs, ts, strict=True):
        line.observe(x, t)
    slope, base = np.polyfit(xs, ts, 1)
    assert (line.base, line.per_unit) == pytest.approx((base, slope), rel=1e-6)


def test_the_line_is_found_and_followed() -> None:
    line = fed(LinearTime(0.0, 0.0), 150, two_tenths_and_a_hundredth, SIZES)
    assert (line.at(1), line.at(40)) == (pytest.approx(0.21, rel=0.05), pytest.approx(0.6, rel=0.05))
    assert line.per_unit == pytest.approx(0.01, rel=0.1)
    fed(line, 300, lambda x: 3 * two_tenths_and_a_hundredth(x), SIZES, seed=1)  # the machine is slower from now on
    assert (line.at(1), line.at(40)) == (pytest.approx(0.63, rel=0.1), pytest.approx(1.8, rel=0.1))


def test_times_without_noise_can_change_too() -> None:
    line = LinearTime(0.0, 0.0)
    for _ in range(500):
        line.observe(5, 0.2)
    for _ in range(300):
        line.observe(5, 0.6)
    assert line.at(5) == pytest.approx(0.6, rel=0.05)


def test_a_wrong_prior_slope_is_corrected_at_once() -> None:
    """The first deviation is taken to be large, so that the second size is no outlier."""
    line = LinearTime(0.0, 0.0)
    for size in (1, 40, 1, 40):
        line.observe(size, two_tenths_and_a_hundredth(size))
    assert (line.at(1), line.at(40)) == (pytest.approx(0.21, rel=0.1), pytest.approx(0.6, rel=0.1))


@pytest.mark.parametrize("clip", [4.0, math.inf])
def test_a_hiccup_does_not_spoil_the_line(clip: float) -> None:
    line = fed(LinearTime(0.0, 0.0, clip=clip), 150, two_tenths_and_a_hundredth, SIZES)
    before = [line.at(x) for x in SIZES]
    line.observe(40, 6.0)
    changed = max(abs(line.at(x) / t - 1) for x, t in zip(SIZES, before, strict=True))
    assert changed < 0.03 if clip == 4 else changed > 0.1  # without clipping it would

    # One pass in twelve takes ten times as long: the mean time would be 1.75 times the usual
    draw = random.Random(5)
    for index in range(300):
        size = draw.choice(SIZES)
        line.observe(size, two_tenths_and_a_hundredth(size) * (10 if index % 12 == 0 else draw.gauss(1, 0.05)))
    off = max(abs(line.at(x) / two_tenths_and_a_hundredth(x) - 1) for x in SIZES)
    assert off < 0.15 if clip == 4 else off > 0.3


def test_passes_of_one_size_do_not_unlearn_the_slope() -> None:
    line = fed(LinearTime(0.0, 0.05), 150, two_tenths_and_a_hundredth, SIZES)
    fed(line, 2000, two_tenths_and_a_hundredth, [5.0], seed=1)
    assert line.per_unit == pytest.approx(0.01, rel=0.1)
    assert line.at(40) == pytest.approx(0.6, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 512), st.floats(0, 10)), max_size=40), times, times)
def test_no_part_of_the_line_is_negative(passes: list[tuple[float, float]], base: float, per_unit: float) -> None:
    line = LinearTime(base, per_unit)
    for size, seconds in passes:
        line.observe(size, seconds)
        assert line.base >= 0
        assert line.per_unit >= 0
        assert math.isfinite(line.at(512))


def test_times_that_fall_with_size_give_no_slope() -> None:
    line = LinearTime(0.0, 0.0)
    for _ in range(20):
        line.observe(1, 0.3)
        line.observe(10, 0.2)
    assert line.per_unit == 0
    assert line.at(100) == pytest.approx(0.25, rel=0.1)
