"""Which rows of logits carry filler. That the sampler is exact with them is tested in tests/v2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_saguaro.vllm_hooks import marked_sampler
from vllm_saguaro.vllm_hooks.coupled_sampler import CoupledSampler
from vllm_saguaro.vllm_hooks.marked_sampler import MarkedSampler, install


class NotedSampler:
    """Notes what it is called with."""

    enable_adaptive_verification = False

    def __call__(self, logits: Any, input_batch: Any, draft_logits: Any, invalid_drafts: Any) -> Any:
        self.draft_logits = draft_logits
        self.invalid = invalid_drafts.tolist()
        return "sampled"


def batch(*drafts: tuple[int, int]) -> Any:
    """Rows of (slot, drafts under verification)."""
    slots = [slot for slot, count in drafts for _ in range(count + 1)]
    positions = [at for _, count in drafts for at in range(count + 1)]
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor(slots), expanded_local_pos=torch.tensor(positions, dtype=torch.int32)
    )


READY = torch.tensor([0, 1, 3, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("rows", "filler"),
    [
        ([(0, 3)], [False, True, True, True]),
        ([(1, 3)], [False, False, True, True]),
        ([(2, 3)], [False, False, False, False]),
        ([(2, 0), (0, 0)], [False, False]),
        ([(3, 1), (0, 2)], [False, False, False, True, True]),
    ],
)
def test_drafts_beyond_the_real_ones_are_marked(rows: list[tuple[int, int]], filler: list[bool]) -> None:
    inner: Any = NotedSampler()
    assert MarkedSampler(inner, READY)(torch.empty(0), batch(*rows), "q") == "sampled"  # type: ignore[arg-type]
    assert inner.invalid == filler
    assert inner.draft_logits == "q"


def test_vllms_own_marks_stay() -> None:
    inner: Any = NotedSampler()
    own = torch.tensor([False, True, False, False])
    MarkedSampler(inner, READY)(torch.empty(0), batch((1, 3)), None, own)
    assert inner.invalid == [False, True, True, True]
    assert own.tolist() == [False, True, False, False], "not written to"


def test_the_rest_of_the_sampler_is_reached() -> None:
    assert MarkedSampler(NotedSampler(), READY).enable_adaptive_verification is False


class AnotherSampler(RejectionSampler):
    """Of a model that verifies in its own way."""

    def __init__(self) -> None:
        self.num_speculative_steps = 3


@pytest.mark.parametrize(
    ("sampler", "coupled", "words"),
    [
        (None, False, "expected vLLM's own V2 rejection sampler, found"),
        (None, True, "expected vLLM's own V2 rejection sampler, found"),
        (AnotherSampler(), True, 'the model verifies drafts with .*: write "draft_sample_method": "probabilistic"'),
    ],
)
def test_only_vllms_own_sampler_is_wrapped(sampler: Any, coupled: bool, words: str) -> None:
    runner: Any = SimpleNamespace(rejection_sampler=sampler)
    with pytest.raises(RuntimeError, match=words):
        install(runner, READY, coupled)


def test_coupled_drafts_have_a_sampler_that_decides_first(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(marked_sampler, "warm_up", lambda *told: warmed.append(told))
    own = RejectionSampler.__new__(RejectionSampler)
    own.num_speculative_steps = 3
    own.sampler = fused = SimpleNamespace(use_flashinfer=True, use_xpu_sampler=True)
    for sampler, coupled, inside in (
        (own, False, RejectionSampler),
        (AnotherSampler(), False, AnotherSampler),
        (own, True, CoupledSampler),
    ):
        assert fused.use_flashinfer, "steps without drafts may draw as they like"
        runner: Any = SimpleNamespace(rejection_sampler=sampler)
        install(runner, READY, coupled)
        assert type(runner.rejection_sampler._sampler) is inside
        assert runner.rejection_sampler.num_speculative_steps == 3
    assert warmed == [(READY.device, 3)], "before a request waits for it"
    assert not fused.use_flashinfer, "one rule for all tokens"
    assert not fused.use_xpu_sampler
