"""Errors that a device engine could have: each must be found by the checks of `device_driver`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.drafting.device_driver import World
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.drafting.device_blocks import BlockLedger
from vllm_saguaro.drafting.device_round import DeviceRound
from vllm_saguaro.kernels.operations import TWINS, Operations
from vllm_saguaro.messages import Sampling

PROMPT = [(7 * i + 3) % 40 for i in range(11)]


def play(operations: Operations = TWINS, sampling: Sampling | None = None) -> None:
    """Two requests, hits and misses in turn, over several block boundaries."""
    world = World(FakeDeviceModel(), slots=3, operations=operations)
    world.admit(0, PROMPT, sampling)
    world.admit(2, PROMPT[:6], sampling)
    world.step({0: (0, 5), 2: (0, 6)})
    for i in range(8):
        tables = {slot: world.table(slot) for slot in (2, 0)}
        world.step({slot: table[(i + slot) % len(table)][0] for slot, table in tables.items()})
        if i % 3 == 2:
            world.step({0: (min(i % 2, len(world.requests[0].drafts)), 17), 2: None})
    assert world.hits > 8


def nothing(*_: Any) -> None:
    """Leave things as they are."""


def adopted_one_late(main: Tensor, private: Tensor, slots: Tensor, branch: Tensor, first: Tensor) -> None:
    TWINS.adopt(main, private, slots, branch, first + 1)


def another_adopted(main: Tensor, private: Tensor, slots: Tensor, branch: Tensor, first: Tensor) -> None:
    TWINS.adopt(main, private, slots, torch.where(branch >= 0, (branch + 1) % private.shape[1], -1), first)


def forked_one_early(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    main, private, slots, lengths, accepted, block_size = arguments
    return TWINS.fork(main, private, slots, lengths - 1, accepted, block_size)


def test_without_a_planted_error_all_is_well() -> None:
    play()
    play(sampling=Sampling(temperature=0.7))


@pytest.mark.parametrize(
    "planted",
    [
        {"copy_blocks": nothing},
        {"adopt": nothing},
        {"adopt": adopted_one_late},
        {"adopt": another_adopted},
        {"fork": forked_one_early},
    ],
    ids=["nothing copied", "nothing adopted", "adopted one late", "another branch adopted", "forked one early"],
)
def test_an_operation_that_does_wrong_is_found(planted: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        play(replace(TWINS, **planted))


@pytest.mark.parametrize("off", [-1, 1])
def test_a_token_glued_at_a_wrong_position_is_found(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DeviceRound._glued_position
    monkeypatch.setattr(DeviceRound, "_glued_position", lambda self, *rest: right(self, *rest) + off)
    with pytest.raises(AssertionError):
        play()


def test_a_table_of_states_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a hit outcomes are predicted from what the branch computed."""
    glue = DeviceRound._glue

    def forgetful(self: DeviceRound, *arguments: Any) -> Tensor:
        states = glue(self, *arguments)
        return states[:, -1:].expand_as(states)

    monkeypatch.setattr(DeviceRound, "_glue", forgetful)
    world = World(FakeDeviceModel(), branches=1)
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    raw = []
    for _ in range(4):
        world.step({0: world.table(0)[0][0]})
        raw.append(world.engine.state.raw[0].clone())
    # The draft is sure of its own likeliest tokens: each has the highest share of its position.
    text = world.requests[0].text
    shares = [
        float(world.q_after([*text, *world.requests[0].drafts[:j]], Sampling(temperature=1.0)).max()) for j in range(3)
    ]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(raw[-1], torch.tensor(shares))


def test_states_of_a_branch_give_the_drafts_their_shares() -> None:
    world = World(FakeDeviceModel(), branches=1)
    world.admit(0, PROMPT)
    world.step({0: (0, 5)})
    for _ in range(4):
        world.step({0: world.table(0)[0][0]})
        text, drafts = world.requests[0].text, world.requests[0].drafts
        shares = [float(world.q_after([*text, *drafts[:j]], Sampling(temperature=1.0)).max()) for j in range(3)]
        torch.testing.assert_close(world.engine.state.raw[0], torch.tensor(shares), atol=1e-5, rtol=1e-4)


def test_too_few_blocks_for_what_is_adopted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockLedger, "needed", lambda self, length: -(-length // 4))
    with pytest.raises(AssertionError):
        play()
