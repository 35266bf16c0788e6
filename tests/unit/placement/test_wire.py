from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.soundness import assert_canonical, assert_sound_step
from tests.unit.placement.strategies import samplings, steps, steps_within
from vllm_saguaro.messages import Admit, Noise, Outcome, Release, Sampling, Stamp, Step, Want
from vllm_saguaro.placement.wire import Limits, WireError, decode, encode

STAMP = Stamp(3, 2, 1)
GREEDY = Sampling()
LIMITS = Limits(slots=8, num_speculative_tokens=4, frame_bytes=4096)
HEADER_BYTES = 14
NOISE_AT = HEADER_BYTES + 16 + 16
"""Where the noise of the first admitted request stands: behind its stamp, temperature, top-k, top-p and min-p."""


@settings(deadline=None)
@given(steps)
def test_a_step_comes_back_as_it_was(step: Step) -> None:
    assert decode(encode(step)) == step


def test_a_long_prompt_comes_back_as_it_was() -> None:
    step = Step(admits=[Admit(STAMP, Sampling(0.5), tuple(range(200_000)))])
    assert decode(encode(step)) == step


def refused_or_sound(data: bytes, limits: Limits) -> None:
    """What the decoder makes of any bytes: nothing, or a sound step that is said in just this way."""
    with contextlib.suppress(WireError):
        step = decode(data, limits)
        assert_sound_step(step, limits)
        assert_canonical(step, data)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_step_or_refused(data: bytes) -> None:
    refused_or_sound(data, LIMITS)
    refused_or_sound(encode(Step())[:6] + data, LIMITS)


def damaged(frame: bytes, other: bytes, data: st.DataObject) -> bytes:
    """A frame with bits flipped, a number changed, a piece cut out or doubled, or another frame's end."""
    found = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(found) - 1)))
        match data.draw(st.sampled_from(["flip", "number", "cut", "double", "splice", "end"])):
            case "flip" if found:
                found[at] ^= 1 << data.draw(st.integers(0, 7))
            case "number":
                width = data.draw(st.sampled_from([1, 2, 4, 8]))
                number = data.draw(st.integers(0, 3) | st.integers(0, 256**width - 1)) % 256**width
                found[at : at + width] = number.to_bytes(width, "little")
            case "cut":
                del found[at : at + data.draw(st.sampled_from([1, 4, 8, 16]))]
            case "double":
                found[at:at] = found[at : at + data.draw(st.sampled_from([1, 4, 16, 28, 48]))]
            case "splice":
                found[at:] = other[data.draw(st.integers(0, len(other))) :]
            case _:
                del found[at:]
    return bytes(found)


@settings(max_examples=150, deadline=None)
@given(steps_within(LIMITS), steps_within(LIMITS), st.data())
def test_any_damaged_step_is_a_step_or_refused(step: Step, other: Step, data: st.DataObject) -> None:
    refused_or_sound(damaged(encode(step), encode(other), data), LIMITS)


@pytest.mark.parametrize("at", range(HEADER_BYTES))
@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_header_that_lies_is_a_step_or_refused(at: int, value: int) -> None:
    for step in (Step(), Step(releases=[Release(STAMP)] * 3), Step(wants=[Want(STAMP, 0, 1, 2)])):
        frame = bytearray(encode(step))
        frame[at] = value
        refused_or_sound(bytes(frame), LIMITS)


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_frame_that_is_too_long_is_refused_before_anything_of_it_is_read() -> None:
    for frame in (encode(Step(releases=[Release(STAMP)] * 20)), bytes(1000)):
        with pytest.raises(WireError, match=f"{len(frame)} bytes, {len(frame) - 1} at most"):
            decode(frame, Limits(frame_bytes=len(frame) - 1))
    assert decode(encode(Step()), Limits(frame_bytes=len(encode(Step())))) == Step()


def test_counts_that_cannot_be_are_refused_before_anything_is_made_of_them() -> None:
    frame = bytearray(encode(Step(releases=[Release(STAMP)] * 3)))
    assert frame[12:14] == (3).to_bytes(2, "little")
    frame[12:14] = b"\xff\xff"
    with pytest.raises(WireError, match=f"{HEADER_BYTES + 16 * 65535} bytes announced at least, {len(frame)} there"):
        decode(bytes(frame))


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (Step(admits=[Admit(Stamp(8, 1, 0), GREEDY, (1,))]), "slot 8 of 8"),
        (Step(wants=[Want(Stamp(8, 1, 0), 0, 1, 2)]), "slot 8 of 8"),
        (Step(outcomes=[Outcome(Stamp(8, 1, 0), 0, 1, 9, (), 0)]), "slot 8 of 8"),
        (Step(releases=[Release(Stamp(8, 1, 0))]), "slot 8 of 8"),
        (Step(wants=[Want(STAMP, 5, 1, 2)]), "a want out of range"),
        (Step(wants=[Want(STAMP, 0, 1, 5)]), "a want out of range"),
        (Step(outcomes=[Outcome(STAMP, 0, 1, 9, (), 5)]), "an outcome out of range"),
        (Step(outcomes=[Outcome(STAMP, 0, 1, 9, (1, 2, 3, 4, 5), 0)]), "an outcome out of range"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_and_is_a_step_without_them(step: Step, fault: str) -> None:
    assert decode(encode(step)) == step
    with pytest.raises(WireError, match=fault):
        decode(encode(step), LIMITS)


def test_what_is_just_within_the_limits_is_a_step() -> None:
    step = Step(
        [Admit(Stamp(7, 1, 0), GREEDY, (1,))],
        [Want(Stamp(7, 1, 0), 4, 1, 4)],
        [Outcome(Stamp(7, 1, 0), 4, 1, 9, (1, 2, 3, 4), 4)],
        [Release(Stamp(7, 1, 0))],
    )
    assert decode(encode(step), LIMITS) == step


def test_every_field_of_a_step_crosses() -> None:
    """All fields differ from their defaults and from each other, so that none can stand in for another."""
    sampling = Sampling(0.75, 50, 0.5, 0.25, Noise.KEY, -(2**63), 17)
    assert all(getattr(sampling, f.name) != f.default for f in dataclasses.fields(Sampling))
    step = Step(
        [Admit(Stamp(1, 2, 3), sampling, (4, 5)), Admit(Stamp(6, 7, 8), GREEDY, ())],
        [Want(Stamp(9, 10, 11), 12, 13, 14)],
        [Outcome(Stamp(15, 16, 2**62), 18, 19, 20, (21, 22, 23), 24)],
        [Release(Stamp(25, 26, 27)), Release(STAMP)],
    )
    assert decode(encode(step)) == step


@settings(deadline=None)
@given(samplings)
def test_greedy_stays_greedy_and_a_cut_stays_a_cut(sampling: Sampling) -> None:
    (admit,) = decode(encode(Step(admits=[Admit(STAMP, sampling, (1,))]))).admits
    assert (admit.sampling.greedy, admit.sampling.coupled, admit.sampling.cut) == (
        sampling.greedy,
        sampling.coupled,
        sampling.cut,
    )


@settings(deadline=None)
@given(steps, st.integers(1, 8))
def test_a_step_that_is_cut_short_or_goes_on_is_refused(step: Step, count: int) -> None:
    frame = encode(step)
    with pytest.raises(WireError):
        decode(frame[:-count])
    with pytest.raises(WireError):
        decode(frame + bytes(count))


def test_another_version_is_refused_by_name() -> None:
    frame = bytearray(encode(Step()))
    assert frame[4] == 2
    for version in (1, 3):
        frame[4] = version
        with pytest.raises(WireError, match=f"version {version}: not a step of version 2"):
            decode(bytes(frame))


@pytest.mark.parametrize(
    "step",
    [
        Step(admits=[Admit(STAMP, GREEDY, (1, -1))]),
        Step(wants=[Want(STAMP, -1, 1, 2)]),
        Step(wants=[Want(STAMP, 0, -1, 2)]),
        Step(wants=[Want(STAMP, 0, 1, -2)]),
        Step(wants=[Want(Stamp(0, -1, 0), 0, 1, 2)]),
        Step(outcomes=[Outcome(STAMP, 0, 1, 9, (-1,), 0)]),
        Step(outcomes=[Outcome(STAMP, 0, -1, 9, (), 0)]),
        Step(outcomes=[Outcome(STAMP, 0, 1, -9, (), 0)]),
        Step(outcomes=[Outcome(STAMP, -1, 1, 9, (), 0)]),
        Step(releases=[Release(Stamp(-1, 1, 0))]),
        Step(releases=[Release(Stamp(0, 1, -1))]),
    ],
)
def test_negative_values_are_refused(step: Step) -> None:
    with pytest.raises(WireError):
        decode(encode(step))


def test_more_accepted_than_were_verified_is_refused() -> None:
    assert decode(encode(Step(outcomes=[Outcome(STAMP, 2, 1, 9, (), 2)])))
    with pytest.raises(WireError, match="outcome"):
        decode(encode(Step(outcomes=[Outcome(STAMP, 2, 1, 9, (), 1)])))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -0.5},
        {"top_k": -1},
        {"top_p": 2.0},
        {"top_p": -0.5},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"min_p": -0.5},
        {"min_p": math.nan},
        {"prompt_length": -1},
    ],
)
def test_sampling_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    sound = Sampling(0.5, 3, 0.5, 0.25, Noise.SEED, 7, 4)
    assert decode(encode(Step(admits=[Admit(STAMP, sound, (1,))]))).admits[0].sampling == sound
    with pytest.raises(WireError, match="out of range"):
        decode(encode(Step(admits=[Admit(STAMP, dataclasses.replace(sound, **changes), (1,))])))


def test_a_noise_that_nobody_knows_is_refused() -> None:
    frame = bytearray(encode(Step(admits=[Admit(STAMP, Sampling(0.5, noise=Noise.KEY), (1,))])))
    assert frame[NOISE_AT] == list(Noise).index(Noise.KEY)
    for number in (len(Noise), 9, 255):
        frame[NOISE_AT] = number
        with pytest.raises(WireError, match=f"noise {number}"):
            decode(bytes(frame))


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_seed_beyond_64_bits_is_an_error_of_the_sender(seed: int) -> None:
    with pytest.raises(struct.error):
        encode(Step(admits=[Admit(STAMP, Sampling(0.5, noise=Noise.KEY, seed=seed), (1,))]))


def test_an_announced_length_is_not_believed() -> None:
    frame = bytearray(encode(Step(admits=[Admit(STAMP, GREEDY, (7,))])))
    at = len(frame) - 8
    assert frame[at : at + 4] == (1).to_bytes(4, "little")
    frame[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(WireError, match="announced"):
        decode(bytes(frame))
