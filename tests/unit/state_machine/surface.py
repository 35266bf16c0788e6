"""All that the state machine has to know of how the two sides are called, and of their inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.unit.state_machine.target import Request
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.drafting.trunk import Tree, Trunk
from vllm_saguaro.messages import Sampling, Stamp
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.turn import Verified


def arrival(request: Request) -> tuple[str, Sequence[int], Sampling]:
    """What `Speculator.begin_step` wants to know of a request."""
    return request.name, request.prompt, request.sampling


def verified(request: Request, sampled: Sequence[int], drafts: int) -> Verified:
    """What `Speculator.propose` wants to know of a row with so many drafts in the pass."""
    text = request.text
    return Verified(
        request.name, sampled, drafts, len(text), lambda: list(text), lambda: request.sampling, request.guess
    )


class DrivenPolicy(Policy):
    """Chooses by what came of the drafts alone: no time that passes here has a say, and nothing is waited for."""

    def __init__(self, num_speculative_tokens: int, backup: str) -> None:
        super().__init__(num_speculative_tokens, backup, adaptive=False)
        self.rest_next = 0
        """From the next step on, so many steps without any drafts."""
        self._resting = 0
        self.late_rows: list[float] = []
        """Drafts gained a row, of every wait for the rest of late branches."""

    def observe_step(self, *measured: Any) -> None:
        pass

    def observe_jit(self, depth: int, seconds: float) -> None:
        pass

    def observe_late(self, asked: int, gained: float, seconds: float) -> None:
        self.late_rows.append(gained)

    def observe_round(self, depth: int, seconds: float) -> None:
        pass

    def more_depths(self, have: int, most: int, late: int) -> int:
        return most - have if self._mode in ("auto", "jit") else 0

    def patience(self, depth: int) -> float:
        return 0.0

    @property
    def quiet(self) -> bool:
        return self._resting > 0

    def resting(self, rows: int) -> bool:
        rests = self.quiet
        self._resting -= rests
        return rests

    def drafts(self, rows: int, sampled: int = 0) -> int:
        self._resting, self.rest_next = self.rest_next, 0
        return super().drafts(rows, sampled)


def stamps_of(speculator: Speculator) -> dict[str, Stamp]:
    """The requests that the draft side has, as the target side sees it."""
    return {name: request.stamp for name, request in speculator._requests.items()}


def free_slots(speculator: Speculator) -> list[int]:
    return speculator._slots.free


def unheard(speculator: Speculator) -> int:
    """Releases that the draft side has not heard of yet."""
    return sum(len(shard.unheard) for shard in speculator._slots.shards)


def entries_of(loop: DraftLoop) -> dict[Stamp, Trunk]:
    """The requests that the draft side has, by the round that it is in with each."""
    return {entry.stamp: entry.trunk for entry in loop._entries.values()}


def leaving(loop: DraftLoop) -> list[Trunk]:
    """Requests that have left and whose blocks are not given back yet."""
    return list(loop._leaving)


def growing_tree(loop: DraftLoop) -> Tree | None:
    return loop._tree


def blocks_written(tree: Tree, block_size: int) -> set[int]:
    """Blocks that the tree will still write into."""
    return {
        int(blocks[position // block_size])
        for blocks, start in zip(tree.blocks, tree.start.tolist(), strict=True)
        for position in range(start + tree.depth, start + tree.depth_limit)
    }
