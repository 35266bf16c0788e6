"""Ranks that take the first one's tokens: in real processes with gloo, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.outputs import SamplerOutput

from tests.unit.vllm_hooks.rank_processes import answers_of_ranks
from vllm_saguaro.vllm_hooks.ranks import install

Tokens = list[list[int]]


class Group:
    """What `ranks.py` uses of vLLM's `GroupCoordinator`."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank_in_group, self.world_size = rank, world_size

    def broadcast(self, tokens: torch.Tensor, src: int = 0) -> torch.Tensor:
        torch.distributed.broadcast(tokens, src=src)
        return tokens


def runner_of(samples: list[torch.Tensor], rows: int) -> Any:
    """A runner whose sampler gives one of these after the other; empty for a rank that must not be asked."""

    def sample(logits: Any, metadata: Any) -> SamplerOutput:
        return SamplerOutput(sampled_token_ids=samples.pop(0), logprobs_tensors=None)

    return SimpleNamespace(_sample=sample, input_batch=SimpleNamespace(num_reqs=rows), device=torch.device("cpu"))


def drafts(*counts: int) -> Any:
    return SimpleNamespace(num_draft_tokens=list(counts), max_spec_len=max(counts))


STEPS: list[tuple[Any, Tokens]] = [
    (None, [[7], [8], [9]]),
    (drafts(2, 0, 1), [[1, 2, 3], [4, -1, -1], [5, 6, -1]]),
    (drafts(0, 0, 0), [[10], [11], [12]]),
    (drafts(0, 4, 0), [[4095, -1, -1, -1, -1], [5, 6, -1, -1, -1], [2**31 - 1, -1, -1, -1, -1]]),
]


RANKS = 3


def _rank(rank: int, meeting: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    samples = [torch.tensor(tokens, dtype=torch.int32) for _, tokens in STEPS]
    runner = runner_of(samples if rank == 0 else [], rows=3)
    group: Any = Group(rank, RANKS)
    install(runner, group)
    answers.put((rank, [runner._sample(None, metadata).sampled_token_ids.tolist() for metadata, _ in STEPS]))
    torch.distributed.destroy_process_group()


def test_every_rank_has_the_tokens_of_the_first(tmp_path: Path) -> None:
    found = dict(answers_of_ranks(RANKS, _rank, tmp_path, 120))
    assert found == {rank: [tokens for _, tokens in STEPS] for rank in range(RANKS)}


def test_a_target_of_one_rank_is_left_alone() -> None:
    runner = runner_of([], rows=1)
    before = runner._sample
    group: Any = Group(0, 1)
    install(runner, group)
    assert runner._sample is before


@pytest.mark.parametrize("tokens", [torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int64)])
def test_tokens_that_the_others_would_not_expect_are_an_error(tokens: torch.Tensor) -> None:
    """Sent all the same they would be read as something else."""
    runner = runner_of([tokens], rows=3)
    group: Any = Group(0, 2)
    install(runner, group)
    with pytest.raises(RuntimeError, match=r"expected int32 \(3, 1\)"):
        runner._sample(None, None)
