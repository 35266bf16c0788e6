from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.algorithm.noise import KeySeeds, NoiseSeeds, gumbel, gumbel_of_all

MASK = 2**64 - 1


@pytest.fixture(scope="module")
def fused_gumbel_argmax() -> Callable[[Tensor, Tensor], Tensor]:
    """vLLM's own kernel: (logits [R, V] float32, seeds [R] int64) -> tokens [R]."""
    platforms = pytest.importorskip("vllm.platforms")
    platforms.current_platform.import_kernels()  # the build for this processor: another one ends the process
    if not hasattr(torch.ops._C, "fused_gumbel_argmax"):
        pytest.skip("this build of vLLM has no CPU sampler")
    return torch.ops._C.fused_gumbel_argmax


def splitmix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def plain_gumbel(seed: int, token: int) -> float:
    """The definition in Python's integers, which do not wrap by themselves."""
    bits = splitmix64((splitmix64(seed) + (token + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11
    return -math.log(-math.log((bits + 0.5) * 2.0**-53))


# --- the noise ---


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
@settings(deadline=None)
def test_noise_is_the_definition_in_unbounded_integers(seed: int, tokens: list[int]) -> None:
    got = gumbel(torch.tensor([seed]), torch.tensor([tokens]))
    assert got.dtype == torch.float64
    expected = torch.tensor([[plain_gumbel(seed, t) for t in tokens]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_smallest_noise_is_finite() -> None:
    # The seed with which token 0 gets bits = 0, from the inverse of splitmix64: u is then 2^-54, not 0.
    def inverse(z: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9)):
            z = (z ^ (z >> shift) ^ (z >> 2 * shift)) * pow(factor, -1, 2**64) & MASK
        return z ^ (z >> 30) ^ (z >> 60)

    seed = inverse(-0x9E3779B97F4A7C15 & MASK)
    got = gumbel(torch.tensor([seed - 2**64 if seed >= 2**63 else seed]), torch.tensor([[0]])).item()
    assert got == pytest.approx(plain_gumbel(seed, 0), rel=1e-12)
    assert got == pytest.approx(-math.log(54 * math.log(2)), rel=1e-12)


def test_arg_max_with_the_noise_is_vllms_kernel(fused_gumbel_argmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    differ = 0
    for vocabulary in (1, 2, 7, 8, 9, 31, 64, 257, 1000, 4099):
        rows = 500
        # Nearly flat, so that the noise decides; and none of it at all on a fifth of the tokens.
        logits = torch.randn(rows, vocabulary, generator=g) * 0.5
        logits = logits.masked_fill(torch.rand(rows, vocabulary, generator=g) < 0.2, -torch.inf)
        logits[:, 0] = 0.0
        seeds = torch.randint(0, 2**31, (rows,), generator=g)
        expected = fused_gumbel_argmax(logits, seeds)
        noise = gumbel(seeds, torch.arange(vocabulary).expand(rows, -1))
        assert torch.equal((logits + noise).argmax(-1), expected)
        differ += int(((logits + noise.flip(0)).argmax(-1) != expected).sum())
    assert differ > 2000  # the noise of other rows would have been noticed


def test_noise_of_a_real_vocabulary_and_of_chosen_tokens(
    fused_gumbel_argmax: Callable[[Tensor, Tensor], Tensor],
) -> None:
    g = torch.Generator().manual_seed(1)
    vocabulary, rows = 128256, 6
    logits = torch.randn(rows, vocabulary, generator=g)
    seeds = torch.randint(0, 2**31, (rows,), generator=g)
    everything = torch.arange(vocabulary).expand(rows, -1)
    noise = gumbel(seeds, everything)
    assert torch.equal((logits + noise).argmax(-1), fused_gumbel_argmax(logits, seeds))
    some = torch.randint(vocabulary, (rows, 64), generator=g)
    assert torch.equal(gumbel(seeds, some), noise.gather(1, some))
    assert torch.equal(gumbel_of_all(seeds, vocabulary), noise)


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel(torch.arange(100), torch.arange(2000).expand(100, -1)).flatten()
    assert noise.isfinite().all()
    # Mean gamma, variance pi^2 / 6; of 200000 numbers the mean has a standard error of .003, the variance of .008.
    assert abs(noise.mean().item() - 0.5772) < 0.012
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.032


# --- the integers ---


def one_by_one(seed: int, count: int) -> list[int]:
    """As vLLM draws them: a call for each output token."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return [int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.int64).item()) for _ in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**63 - 1, 2**64 - 1, -5])
def test_pieces_are_the_numbers_of_one_call_each(seed: int) -> None:
    seeds = NoiseSeeds(seed)
    assert [seeds.at(i) for i in range(1000)] == one_by_one(seed, 1000)


@given(st.integers(0, 2**32), st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_order_of_asking_and_forgetting(seed: int, calls: list[tuple[bool, int]]) -> None:
    expected = one_by_one(seed, 401)
    seeds, gone = NoiseSeeds(seed), 0
    for forgets, index in calls:
        if forgets:
            seeds.forget(index)
            gone = max(gone, index)
        elif index < gone:
            with pytest.raises(IndexError, match="gone"):
                seeds.at(index)
        else:
            assert seeds.at(index) == expected[index]


def test_a_negative_index_is_refused() -> None:
    seeds = NoiseSeeds(3)
    seeds.at(5)
    with pytest.raises(IndexError):
        seeds.at(-1)


def test_memory_stays_within_the_window() -> None:
    seeds, window, most = NoiseSeeds(9), 20, 0
    for i in range(5000):
        seeds.at(i)
        seeds.forget(i - window)
        most = max(most, len(seeds._kept))
    assert most < window + 100
    seeds.forget(10**5)
    assert len(seeds._kept) < 100


def test_it_draws_from_no_generator_but_its_own() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = NoiseSeeds(5), NoiseSeeds(5)
    interleaved = [(first.at(i), second.at(i)) for i in range(200)]
    assert all(a == b for a, b in interleaved)
    assert torch.equal(torch.get_rng_state(), before)


# --- the integers of a key ---


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6))
@settings(deadline=None)
def test_the_integers_of_a_key_are_a_hash_that_fits_a_signed_integer(key: int, index: int) -> None:
    seeds = KeySeeds(key)
    seeds.forget(index + 10)  # nothing is ever gone
    got = seeds.at(index)
    assert got == splitmix64((key + (index + 1) * 0x9E3779B97F4A7C15) & MASK) >> 2
    assert 0 <= got < 2**62


def test_keys_and_positions_have_their_own_integers() -> None:
    keys = [KeySeeds(key) for key in (0, 1, 2, 2**63)]
    assert len({seeds.at(i) for seeds in keys for i in range(1000)}) == 4000
    with pytest.raises(IndexError, match="no noise number"):
        keys[0].at(-1)
