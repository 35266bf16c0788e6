"""Errors to plant on either side, each of which the state machine must find."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.unit.drafting.fake_model import FakeModel
from tests.unit.state_machine.two_sides import DrivenChannel
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.drafting.trunk import Branch, Trunk
from vllm_saguaro.messages import Step, Table
from vllm_saguaro.slots import Slots
from vllm_saguaro.speculator import Speculator


def a_miss_does_not_cut_valid_back(patch: pytest.MonkeyPatch) -> None:
    settle = DraftEngine.settle

    def planted(self: DraftEngine, trunk: Trunk, *outcome: Any) -> bool:
        valid = trunk.valid
        adopted = settle(self, trunk, *outcome)
        if not adopted:
            trunk.valid = min(valid, trunk.length)
        return adopted

    patch.setattr(DraftEngine, "settle", planted)


def dropped_branches_keep_their_blocks(patch: pytest.MonkeyPatch) -> None:
    def planted(self: DraftEngine, trunk: Trunk, keep: Branch | None = None) -> None:
        trunk.branches = [] if keep is None else [keep]

    patch.setattr(DraftEngine, "_give_up", planted)


def a_table_is_looked_up_whatever_its_stamp(patch: pytest.MonkeyPatch) -> None:
    read = DrivenChannel.read

    def planted(self: DrivenChannel, slot: int) -> Table | None:
        table = read(self, slot)
        awaited = [stamp for stamp in self.stamps().values() if stamp.slot == slot]
        return None if table is None else dataclasses.replace(table, stamp=awaited[0])

    patch.setattr(DrivenChannel, "read", planted)


def no_block_is_copied_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeModel, "copy_blocks", lambda self, source, destination: None)


def blocks_are_given_back_while_the_tree_grows(patch: pytest.MonkeyPatch) -> None:
    leave = DraftLoop._leave

    def planted(self: DraftLoop, entry: Any) -> None:
        leave(self, entry)
        self._let_go()

    patch.setattr(DraftLoop, "_leave", planted)


def a_release_that_was_refused_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    post = Speculator._post

    def planted(self: Speculator, step: Step) -> None:
        post(self, step)
        for shard in self._slots.shards:
            shard.unheard = []

    patch.setattr(Speculator, "_post", planted)


def a_tree_that_is_stopped_is_not_begun_again(patch: pytest.MonkeyPatch) -> None:
    stop = DraftLoop._stop_growing

    def planted(self: DraftLoop, settled: set[int]) -> None:
        stopped = list(self._growing)
        stop(self, settled)
        for entry in stopped:
            entry.forked = True

    patch.setattr(DraftLoop, "_stop_growing", planted)


def a_slot_is_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "give", lambda self, slot: None)
