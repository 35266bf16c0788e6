from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.strategies import steps
from vllm_saguaro.messages import Admit, Outcome, Release, Stamp, Step
from vllm_saguaro.placement.wire import WireError, decode, encode

STAMP = Stamp(3, 2, 1)


@given(steps)
def test_a_step_comes_back_as_it_was(step: Step) -> None:
    assert decode(encode(step)) == step


def test_a_long_prompt_comes_back_as_it_was() -> None:
    step = Step(admits=[Admit(STAMP, 0.5, tuple(range(200_000)))])
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
            assert all(o.accepted >= 0 and o.bonus >= 0 and o.length >= 0 for o in found.outcomes)


@given(steps, st.integers(1, 8))
def test_a_step_that_is_cut_short_or_goes_on_is_refused(step: Step, count: int) -> None:
    frame = encode(step)
    with pytest.raises(WireError):
        decode(frame[:-count])
    with pytest.raises(WireError):
        decode(frame + bytes(count))


def test_another_version_is_refused_by_name() -> None:
    frame = bytearray(encode(Step()))
    frame[4] += 1
    with pytest.raises(WireError, match="version 2"):
        decode(bytes(frame))


@pytest.mark.parametrize(
    "step",
    [
        Step(admits=[Admit(STAMP, 0.0, (1, -1))]),
        Step(outcomes=[Outcome(STAMP, 0, 1, 9, (-1,))]),
        Step(outcomes=[Outcome(STAMP, 0, -1, 9, ())]),
        Step(outcomes=[Outcome(STAMP, -1, 1, 9, ())]),
        Step(releases=[Release(Stamp(-1, 1, 0))]),
        Step(releases=[Release(Stamp(0, 1, -1))]),
    ],
)
def test_negative_values_are_refused(step: Step) -> None:
    with pytest.raises(WireError):
        decode(encode(step))


def test_an_announced_length_is_not_believed() -> None:
    frame = bytearray(encode(Step(admits=[Admit(STAMP, 0.0, (7,))])))
    at = frame.index((1).to_bytes(4, "little"), 12 + 16)
    frame[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(WireError, match="announced"):
        decode(bytes(frame))
