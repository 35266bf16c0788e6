"""Noise that both sides know: the target's draws are vLLM's own, and the draft side can say them beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_saguaro.algorithm.noise import KeySeeds, NoiseSeeds, gumbel_of_all
from vllm_saguaro.messages import Noise
from vllm_saguaro.vllm_hooks.known_noise import KnownNoise, RequestKeys

VOCABULARY = 40
RANDOM = SamplingParams(temperature=1.0)


@pytest.fixture(autouse=True)
def _the_same_random_numbers() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def sampler() -> TopKTopPSampler:
    return cpu_sampler("raw_logprobs")


def cpu_sampler(mode: Any) -> TopKTopPSampler:
    current_platform.import_kernels()
    made = TopKTopPSampler(logprobs_mode=mode)
    if not KnownNoise.possible(made) or not hasattr(torch.ops._C, "fused_gumbel_argmax"):
        pytest.skip("this build of vLLM samples otherwise")
    return made


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY) * 0.5


def generators(*rows: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(100 + row) for row in rows}


# ---- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "p"), [(None, None), (5, None), (None, 0.7), (8, 0.6)])
def test_rows_without_an_integer_are_drawn_as_vllm_draws_them(
    sampler: TopKTopPSampler, k: int | None, p: float | None
) -> None:
    rows = 12
    top_k = None if k is None else torch.full((rows,), k)
    top_p = None if p is None else torch.full((rows,), p)
    known, given = KnownNoise(sampler), {1: 17, 5: 2**61, 11: 0}
    others = [row for row in range(rows) if row not in given]
    differing = 0
    for trial in range(40):
        logits = logits_of(rows)
        torch.manual_seed(trial)
        expected, _ = sampler.forward_cpu(logits.clone(), generators(0, 5, 6), top_k, top_p)
        after = torch.get_rng_state()
        torch.manual_seed(trial)
        with known.given(given):
            found, _ = known(logits.clone(), generators(0, 5, 6), top_k, top_p)
        assert torch.equal(found[others], expected[others])
        assert torch.equal(torch.get_rng_state(), after), "the rows of the next step would be drawn otherwise"
        differing += int((found[list(given)] != expected[list(given)]).sum())
    assert differing > 20, "the integers were not used"


def test_rows_with_an_integer_are_what_the_kernel_and_the_draft_side_make_of_it(sampler: TopKTopPSampler) -> None:
    known, rows = KnownNoise(sampler), 200
    logits = logits_of(rows)
    integers = {row: 2**62 - 1 - 12345 * row for row in range(0, rows, 2)}
    with known.given(integers):
        found, processed = known(logits.clone(), {}, None, None)
    assert processed is None
    seeds, at = torch.tensor(list(integers.values())), list(integers)
    assert torch.equal(found[at], torch.ops._C.fused_gumbel_argmax(logits[at], seeds))
    assert torch.equal(found[at], (logits[at].double() + gumbel_of_all(seeds, VOCABULARY)).argmax(-1))
    for row, integer in list(integers.items())[:20]:  # whatever else is in the batch
        with known.given({0: integer}):
            assert known(logits[row : row + 1].clone(), {}, None, None)[0].item() == found[row].item()


def test_the_cuts_hold_for_rows_with_an_integer(sampler: TopKTopPSampler) -> None:
    known, rows = KnownNoise(sampler), 300
    logits = logits_of(rows)
    with known.given({row: 7 * row for row in range(rows)}):
        found, _ = known(logits.clone(), {}, torch.full((rows,), 3), None)
    kept = logits.topk(3).indices
    assert (kept == found.unsqueeze(1)).any(1).all()
    assert len({(kept[row] == found[row]).nonzero().item() for row in range(rows)}) == 3


def test_outside_of_given_and_without_integers_all_is_vllms_own(sampler: TopKTopPSampler) -> None:
    known, logits = KnownNoise(sampler), logits_of(8)
    torch.manual_seed(3)
    expected, _ = sampler.forward_cpu(logits.clone(), generators(2), None, None)
    with known.given(dict.fromkeys(range(8), 5)):
        pass
    for context in (contextlib.nullcontext(), known.given({})):
        torch.manual_seed(3)
        with context:
            found, _ = known(logits.clone(), generators(2), None, None)
        assert torch.equal(found, expected)


def test_given_ends_also_where_the_step_fails(sampler: TopKTopPSampler) -> None:
    known = KnownNoise(sampler)
    with pytest.raises(RuntimeError), known.given({0: 5}):
        raise RuntimeError
    with known.given({0: 5}):
        with known.given({0: 6}):
            pass
        assert known._integers == {0: 5}
    assert known._integers == {}


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits", "processed_logprobs"])
def test_processed_logits_and_logprobs_are_vllms(mode: Any) -> None:
    made = cpu_sampler(mode)
    logits, k = logits_of(4), torch.full((4,), 5)
    _, expected = made.forward_cpu(logits.clone(), {}, k, None)
    known = KnownNoise(made)
    with known.given({1: 5}):
        _, found = known(logits.clone(), {}, k, None)
    assert (found is None) == (expected is None) == (mode == "raw_logprobs")
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_where_one_integer_decides_nothing_no_noise_is_known() -> None:
    assert not KnownNoise.possible(TopKTopPSampler(use_fp64_gumbel=True))
    other = TopKTopPSampler()
    other.forward = other.forward_native
    assert not KnownNoise.possible(other)


# ---- keys -----------------------------------------------------------------------------------------------------------


def keys(seed: int = 0, known: bool = True, keyed: bool = True) -> RequestKeys:
    return RequestKeys(seed, known, keyed)


def test_a_request_keeps_its_key_and_no_other_has_it() -> None:
    made = keys()
    noises = {name: made.noise_of(name, RANDOM) for name in ("a", "b", "c")}
    assert {noise for noise, _ in noises.values()} == {Noise.KEY}
    assert len(set(noises.values())) == 3
    assert {name: made.noise_of(name, RANDOM) for name in ("c", "a", "b")} == noises


def test_the_keys_follow_from_the_engines_seed() -> None:
    def drawn(seed: int) -> list[int]:
        made = keys(seed)
        return [made.noise_of(str(i), RANDOM)[1] for i in range(20)]

    assert drawn(5) == drawn(5)
    assert not set(drawn(5)) & set(drawn(6))
    for seed in (-1, 2**64 + 5, 2**63):
        assert all(-(2**63) <= key < 2**63 for key in drawn(seed))


def test_a_request_that_ended_has_no_key_and_one_of_the_same_name_another() -> None:
    made = keys()
    noise = made.noise_of("a", RANDOM)
    made.forget("a")
    made.forget("a")
    assert made.integers("a", 0, 3) == []
    assert made.noise_of("a", RANDOM) != noise


@pytest.mark.parametrize(
    ("params", "known", "keyed", "expected"),
    [
        (SamplingParams(temperature=0.0), True, True, Noise.UNKNOWN),
        (SamplingParams(temperature=0.0, seed=5), True, True, Noise.UNKNOWN),
        (SamplingParams(temperature=1.0), True, True, Noise.KEY),
        (SamplingParams(temperature=1.0), True, False, Noise.UNKNOWN),
        (SamplingParams(temperature=1.0), False, True, Noise.UNKNOWN),
        (SamplingParams(temperature=1.0, seed=5), True, True, Noise.SEED),
        (SamplingParams(temperature=1.0, seed=5), True, False, Noise.SEED),
        (SamplingParams(temperature=1.0, seed=5), False, True, Noise.UNKNOWN),
        (SamplingParams(temperature=1.0, seed=0), True, True, Noise.SEED),
    ],
)
def test_whose_noise_is_known(params: SamplingParams, known: bool, keyed: bool, expected: Noise) -> None:
    made = keys(known=known, keyed=keyed)
    noise, seed = made.noise_of("a", params)
    assert noise is expected
    if expected is Noise.SEED:
        assert seed == params.seed
    if expected is not Noise.KEY:
        assert made.integers("a", 0, 3) == [], "a request with a seed of its own has vLLM's generator"


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -5, -(2**63)])
def test_a_seed_of_64_bits_crosses_signed_and_stays_the_same_seed(seed: int) -> None:
    noise, signed = keys().noise_of("a", SamplingParams(temperature=1.0, seed=seed))
    assert noise is Noise.SEED
    assert -(2**63) <= signed < 2**63
    generator = torch.Generator().manual_seed(seed)  # vLLM's
    expected = [torch.randint(0, 2**31, (1,), generator=generator).item() for _ in range(5)]
    assert [NoiseSeeds(signed).at(i) for i in range(5)] == expected


def test_both_sides_have_the_same_integers_of_a_key() -> None:
    made = keys(3)
    for name in map(str, range(50)):
        _, key = made.noise_of(name, RANDOM)
        theirs = KeySeeds(key)
        assert made.integers(name, 0, 10) == [theirs.at(i) for i in range(10)]
        assert made.integers(name, 1000, 3) == [theirs.at(1000 + i) for i in range(3)]
    assert made.integers("0", 4, 0) == []
    assert made.integers("nobody", 0, 3) == []


# ---- are they random? -----------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """In standard deviations from its mean: beyond 6 is no chance."""
    value = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (value - freedom) / (2 * freedom) ** 0.5


def race(integers: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What is drawn from the logits [V] with each of the integers."""
    seeds = torch.tensor(integers)
    return (logits.double() + gumbel_of_all(seeds, len(logits))).argmax(-1)


def test_tokens_of_keyed_requests_are_draws_from_the_softmax() -> None:
    made, logits = keys(11), torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.3])
    count = 0
    totals = torch.zeros(len(logits))
    for name in map(str, range(300)):  # many keys at the same positions, and many positions of each
        made.noise_of(name, RANDOM)
        tokens = race(made.integers(name, 0, 200), logits)
        totals += torch.bincount(tokens, minlength=len(logits))
        count += 200
    assert abs(chi_square(totals, count * logits.softmax(-1))) < 6


@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbouring_positions_and_neighbouring_keys_are_independent(lag: int) -> None:
    flat = torch.zeros(6)
    along = race([KeySeeds(77).at(i) for i in range(40_000)], flat)
    across = race([KeySeeds(1000 + i).at(3) for i in range(40_000)], flat)
    # key + 1 at one position and key at the next would be the same number, were the index added to the key as it is
    diagonal = race([KeySeeds(5000 - i).at(i) for i in range(40_000)], flat)
    for tokens in (along, across, diagonal):
        pairs = torch.bincount(6 * tokens[:-lag] + tokens[lag:], minlength=36).float()
        assert abs(chi_square(pairs, torch.full((36,), len(tokens[lag:]) / 36))) < 6


def test_no_integer_comes_twice() -> None:
    made = keys(2)
    drawn: list[int] = []
    for name in map(str, range(100)):
        made.noise_of(name, RANDOM)
        drawn += made.integers(name, 0, 300)
    assert len(set(drawn)) == len(drawn)
    assert min(drawn) >= 0
    assert max(drawn) < 2**62
    high = torch.tensor([n >> 61 for n in drawn], dtype=torch.float32).mean().item()
    assert abs(high - 0.5) < 0.02
