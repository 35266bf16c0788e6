"""Ranks under runner V2 that have the first one's tokens and drafts: in real processes with gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.vllm_hooks.rank_processes import answers_of_ranks
from tests.unit.vllm_hooks.test_ranks import Group
from vllm_saguaro.vllm_hooks.device_ranks import install

K = 3
STEPS = [  # sampled tokens, how many count, how many drafts were rejected, and the drafts for the next step
    ([[7], [8]], [1, 1], [0, 0], [[1, 2, 3], [4, 5, 6]]),
    ([[1, 2, 9, 0], [4, 0, 0, 0]], [3, 1], [1, 3], [[10, 11, 12], [2**31, 0, 5]]),
    ([[3, 2, 9, 4]], [4], [0], [[0, 0, 0]]),
]


def runner_of(booked: list[Any]) -> Any:
    """A runner that writes down what it books."""

    def postprocess_sampled(slots: Tensor, tokens: Tensor, sampled: Tensor, rejected: Tensor, *others: Any) -> None:
        kinds = [str(one.dtype) for one in (tokens, sampled, rejected)]
        booked.append((slots.tolist(), tokens.tolist(), sampled.tolist(), rejected.tolist(), kinds, others))

    return SimpleNamespace(postprocess_sampled=postprocess_sampled, num_speculative_steps=K, device=torch.device("cpu"))


def step(runner: Any, speculator: Any, number: int, wrong: bool) -> list[list[int]]:
    """One step of a rank; where it is not the first, all that it finds itself is wrong."""
    tokens, sampled, rejected, drafts = (torch.tensor(one) for one in STEPS[number])
    if wrong:
        tokens, sampled, rejected, drafts = tokens + 1, sampled + 1, rejected + 1, drafts + 1
    slots = torch.arange(len(tokens))
    runner.postprocess_sampled(slots, tokens, sampled.int(), rejected.int(), "starts")
    speculator.ranks.share(drafts)
    return drafts.tolist()


def _rank(rank: int, meeting: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    booked: list[Any] = []
    runner, speculator = runner_of(booked), SimpleNamespace(ranks=None)
    group: Any = Group(rank, 2)
    install(runner, speculator, group)  # type: ignore[arg-type]
    drafts = [step(runner, speculator, number, wrong=rank > 0) for number in range(len(STEPS))]
    answers.put((rank, booked, drafts))
    torch.distributed.destroy_process_group()


def test_every_rank_books_and_drafts_what_the_first_one_does(tmp_path: Path) -> None:
    found = {rank: (booked, drafts) for rank, booked, drafts in answers_of_ranks(2, _rank, tmp_path, 120)}
    kinds = ["torch.int64", "torch.int32", "torch.int32"]
    booked = [
        (list(range(len(tokens))), tokens, sampled, rejected, kinds, ("starts",))
        for tokens, sampled, rejected, _ in STEPS
    ]
    expected = booked, [drafts for *_, drafts in STEPS]
    assert found == {0: expected, 1: expected}


def test_a_target_of_one_rank_is_left_alone() -> None:
    runner, speculator = runner_of([]), SimpleNamespace(ranks=None)
    before = runner.postprocess_sampled
    group: Any = Group(0, 1)
    install(runner, speculator, group)  # type: ignore[arg-type]
    assert runner.postprocess_sampled is before
    assert speculator.ranks is None


class Nobody(Group):
    """A group in which nobody hears."""

    def broadcast(self, tokens: Tensor, src: int = 0) -> Tensor:
        return tokens


@pytest.mark.parametrize("rank", [0, 1])
def test_drafts_of_a_step_that_was_not_booked_are_an_error(rank: int) -> None:
    """Sent all the same they would be those of another step."""
    runner, speculator = runner_of([]), SimpleNamespace(ranks=None)
    group: Any = Nobody(rank, 2)
    install(runner, speculator, group)  # type: ignore[arg-type]
    step(runner, speculator, 0, wrong=False)
    with pytest.raises(RuntimeError, match="no tokens were booked before"):
        speculator.ranks.share(torch.zeros(2, K, dtype=torch.int64))
