from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.strategies import samplings, steps
from vllm_saguaro.messages import Admit, Noise, Outcome, Release, Sampling, Stamp, Step, Want
from vllm_saguaro.placement.wire import WireError, decode, encode

STAMP = Stamp(3, 2, 1)
GREEDY = Sampling()
HEADER_BYTES = 14
NOISE_AT = HEADER_BYTES + 16 + 16
"""Where the noise of the first admitted request stands: behind its stamp, temperature, top-k, top-p and min-p."""


@given(steps)
def test_a_step_comes_back_as_it_was(step: Step) -> None:
    assert decode(encode(step)) == step


def test_a_long_prompt_comes_back_as_it_was() -> None:
    step = Step(admits=[Admit(STAMP, Sampling(0.5), tuple(range(200_000)))])
    assert decode(encode(step)) == step


@given(st.binary(max_size=200))
def test_any_bytes_are_a_step_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode(data), Step)


@settings(max_examples=400)
@given(steps, st.data())
def test_any_damaged_step_is_a_step_or_refused(step: Step, data: st.DataObject) -> None:
    frame = bytearray(encode(step))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (bytes(frame), bytes(frame[:cut]), bytes(frame) + bytes(frame[:cut])):
        with contextlib.suppress(WireError):
            found = decode(damaged)
            assert all(token >= 0 for admit in found.admits for token in admit.token_ids)
            assert all(0 <= o.accepted <= o.verified and o.bonus >= 0 and o.length >= 0 for o in found.outcomes)
            assert all(min(want.accepted, want.bonus, want.depth) >= 0 for want in found.wants)
            assert all(is_sound(admit.sampling) for admit in found.admits)


def is_sound(sampling: Sampling) -> bool:
    """Whether nothing that is made of it can go wrong."""
    numbers = sampling.temperature, sampling.top_p, sampling.min_p
    return (
        all(math.isfinite(number) and number >= 0 for number in numbers)
        and max(sampling.top_p, sampling.min_p) <= 1
        and sampling.top_k >= 0
        and sampling.prompt_length >= 0
        and sampling.noise in Noise
    )


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


@given(samplings)
def test_greedy_stays_greedy_and_a_cut_stays_a_cut(sampling: Sampling) -> None:
    (admit,) = decode(encode(Step(admits=[Admit(STAMP, sampling, (1,))]))).admits
    assert (admit.sampling.greedy, admit.sampling.coupled, admit.sampling.cut) == (
        sampling.greedy,
        sampling.coupled,
        sampling.cut,
    )


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
    for number in (3, 9, 255):
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
