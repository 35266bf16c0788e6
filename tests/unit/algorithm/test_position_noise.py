"""The noise as a function. That it is vLLM's is tested in tests/unit/vllm_hooks/test_coupled_sampler.py."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro.algorithm.position_noise import PositionStems, add_noise, gumbel, gumbel_of_all, stem_of, stems

SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(SEEDS, st.integers(1, 2**31))
def test_both_forms_of_a_stem_agree(seed: int, position: int) -> None:
    tensor = stems(torch.tensor([seed]), torch.tensor([position]))
    assert tensor.item() == stem_of(seed, position)
    assert 0 <= stem_of(seed, position) < 2**32


@given(SEEDS, st.integers(0, 1000), st.integers(0, 1000))
def test_numbers_of_a_request_are_those_of_its_positions(seed: int, prompt_length: int, index: int) -> None:
    assert PositionStems(seed, prompt_length).at(index) == stem_of(seed, prompt_length + index)


def test_a_seed_is_its_64_bits() -> None:
    assert stem_of(-1, 5) == stem_of(2**64 - 1, 5)


def test_the_noise_is_gumbels() -> None:
    noise = gumbel_of_all(stems(torch.arange(40), torch.arange(1, 41)), 5000).flatten()
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01  # Euler's constant
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    for at in (-1.0, 0.0, 1.0, 3.0):
        assert abs((noise < at).double().mean().item() - math.exp(-math.exp(-at))) < 0.005


def test_tokens_positions_and_seeds_all_matter() -> None:
    every = [
        gumbel(stems(torch.tensor([seed]), torch.tensor([position])), torch.tensor([[token]])).item()
        for seed in (1, 2, 2**32 + 1)
        for position in (3, 4)
        for token in (0, 1, 70_000)
    ]
    assert len(set(every)) == len(every)


def test_rows_without_noise_are_left_alone() -> None:
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    add_noise(logits, torch.tensor([0.5, 0.0]), torch.tensor([7, 7]), torch.tensor([True, False]))
    expected = torch.tensor([2.0, 4.0]) + gumbel(torch.tensor([7]), torch.tensor([[0, 1]]))[0].float()
    assert torch.equal(logits, torch.stack((expected, torch.tensor([1.0, 2.0]))))
