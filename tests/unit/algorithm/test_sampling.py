from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.algorithm.noise import NoiseSeeds, gumbel
from vllm_saguaro.algorithm.sampling import (
    SUPPORT,
    Candidates,
    SamplingRows,
    candidates,
    deflate,
    draw,
    race,
    top,
)
from vllm_saguaro.messages import Sampling

DRAWS = 200_000


def random_logits(seed: int, rows: int, vocabulary: int, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def random_q(seed: int, rows: int, count: int) -> Tensor:
    """Rows by falling probability, some with zeros at the end."""
    q = random_logits(seed, rows, count).softmax(-1).sort(-1, descending=True).values
    g = torch.Generator().manual_seed(seed + 1)
    kept = torch.randint(1, count + 1, (rows, 1), generator=g)
    q = q.masked_fill(torch.arange(count) >= kept, 0.0)
    return q / q.sum(-1, keepdim=True)


def distance(q: Tensor, drawn: Tensor) -> float:
    """How far the frequencies of `drawn` are from q, in standard deviations of chi-square; inf if one cannot be."""
    counts = torch.bincount(drawn, minlength=len(q)).double()
    if counts[q == 0].any():
        return math.inf
    expected = q[q > 0].double() * len(drawn)
    chi_square = ((counts[q > 0] - expected) ** 2 / expected).sum().item()
    freedom = int((q > 0).sum()) - 1
    # Wilson and Hilferty: (chi^2 / n)^(1/3) is nearly normal
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


LIMIT = 3.5


@pytest.fixture
def vllm_cuts() -> Callable[[Tensor, list[Sampling]], Tensor]:
    """vLLM's own: logits with temperature, min-p, top-k and top-p applied, -inf where a token is out."""
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    def cut(logits: Tensor, samplings: list[Sampling]) -> Tensor:
        z = logits / torch.tensor([s.temperature for s in samplings]).unsqueeze(-1)
        min_p: Any = MinPLogitsProcessor.__new__(MinPLogitsProcessor)  # without the engine's configuration
        min_p.min_p_count = 1
        min_p.min_p = torch.tensor([s.min_p for s in samplings]).unsqueeze(-1)
        k = torch.tensor([s.top_k or logits.shape[-1] for s in samplings])
        p = torch.tensor([s.top_p for s in samplings])
        return apply_top_k_top_p_pytorch(min_p.apply(z), k, p)

    return cut


def on_an_edge(logits: Tensor, sampling: Sampling) -> bool:
    """Whether rounding decides, for a row of logits [V], if some token is in."""
    q = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True).values
    relative = q / q[0]
    near = ((relative - sampling.min_p).abs() < 1e-5 * sampling.min_p).any()
    q = q[relative >= sampling.min_p][: sampling.top_k or None]
    if sampling.top_p < 1:
        near |= ((q / q.sum()).cumsum(0) - sampling.top_p).abs().min() < 1e-5
    return bool(near)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.2, 3.0),
    top_k=st.one_of(st.just(0), st.integers(1, 40)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
)


def of(*rows: Sampling) -> SamplingRows:
    return SamplingRows.of(rows, "cpu")


def in_vocabulary(found: Candidates, vocabulary: int) -> Tensor:
    """q [R, V]."""
    return torch.zeros(len(found.q), vocabulary).scatter(-1, found.tokens, found.q)


# --- the rows' sampling ---


def test_a_greedy_row_predicts_with_the_whole_of_its_distribution() -> None:
    rows = of(Sampling(0.0, top_k=2, top_p=0.5, min_p=0.5), Sampling(0.5, top_k=2, top_p=0.25, min_p=0.5))
    assert rows.temperature.tolist() == [1.0, 0.5]
    assert rows.top_k.tolist() == [0, 2]
    assert rows.top_p.tolist() == [1.0, 0.25]
    assert rows.min_p.tolist() == [0.0, 0.5]
    dtypes = [rows.temperature.dtype, rows.top_k.dtype, rows.top_p.dtype, rows.min_p.dtype]
    assert dtypes == [torch.float32, torch.int64, torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("sampling", "nucleus"),
    [
        (Sampling(1.0), False),
        (Sampling(1.0, top_p=0.9), True),
        (Sampling(1.0, top_k=SUPPORT, top_p=0.9), False),
        (Sampling(1.0, top_k=SUPPORT + 1, top_p=0.9), True),
        (Sampling(0.0, top_p=0.9), False),
    ],
)
def test_when_the_mass_of_the_whole_vocabulary_is_needed(sampling: Sampling, nucleus: bool) -> None:
    assert of(Sampling(1.0), sampling).nucleus is nucleus


def test_taking_rows_for_their_branches() -> None:
    rows = of(Sampling(0.5, 1, 0.5, 0.1), Sampling(0.25, 2, 0.75, 0.2)).take(torch.tensor([1, 1, 0]))
    assert rows.temperature.tolist() == [0.25, 0.25, 0.5]
    assert rows.top_k.tolist() == [2, 2, 1]
    assert rows.top_p.tolist() == [0.75, 0.75, 0.5]
    torch.testing.assert_close(rows.min_p, torch.tensor([0.2, 0.2, 0.1]))
    assert (rows.nucleus, rows.cut) == (False, True)
    assert of(Sampling(1.0, top_p=0.5)).take(torch.tensor([0])).nucleus is True
    assert of(Sampling(1.0), Sampling(0.0, top_k=5)).take(torch.tensor([1])).cut is False


@given(st.integers(0, 10**6), st.floats(0.2, 3.0), st.sampled_from([5, 300]))
@settings(deadline=None)
def test_rows_without_cuts_are_the_same_beside_one_that_has(seed: int, temperature: float, vocabulary: int) -> None:
    logits = random_logits(seed, 2, vocabulary)
    alone = candidates(logits[:1], of(Sampling(temperature)))
    beside = candidates(logits, of(Sampling(temperature), Sampling(1.0, 3, 0.5, 0.1)))
    assert torch.equal(alone.tokens[0], beside.tokens[0])
    torch.testing.assert_close(alone.q[0], beside.q[0])


# --- top ---


@given(st.integers(0, 10**6), st.sampled_from([1, 40, 64, 2048, 4096, 4127]), st.integers(1, 70))
@settings(max_examples=80, deadline=None)
def test_top_is_topk(seed: int, vocabulary: int, count: int) -> None:
    count = min(count, vocabulary)
    z = random_logits(seed, 6, vocabulary).view(2, 3, vocabulary)
    z = z.masked_fill(torch.rand(z.shape, generator=torch.Generator().manual_seed(seed)) < 0.3, -torch.inf)
    value, index = top(z, count)
    assert torch.equal(value, z.topk(count, dim=-1).values)
    assert torch.equal(z.gather(-1, index), value)
    assert all(len(set(row)) == count for row in index.view(6, count).tolist())


@pytest.mark.parametrize("place", ["one group", "tail", "anywhere"])
def test_top_finds_the_largest_wherever_they_are(place: str) -> None:
    vocabulary, count = 32 * 200 + 5, 20
    stride = vocabulary // 32
    tokens = {
        "one group": torch.arange(count) * stride + 7,
        "tail": torch.arange(vocabulary - count, vocabulary),
        "anywhere": torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:count],
    }[place]
    z = random_logits(0, 1, vocabulary)[0]
    z[tokens] += 100
    assert set(top(z, count)[1].tolist()) == set(tokens.tolist())


# --- candidates ---


@given(st.integers(0, 10**6), st.integers(1, 64), st.lists(samplings, min_size=1, max_size=4))
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_cuts_are_vllms(
    vllm_cuts: Callable[[Tensor, list[Sampling]], Tensor], seed: int, vocabulary: int, rows: list[Sampling]
) -> None:
    rows = [replace(s, top_k=min(s.top_k, vocabulary)) for s in rows]
    logits = random_logits(seed, len(rows), vocabulary)
    assume(not any(on_an_edge(z, s) for z, s in zip(logits, rows, strict=True)))
    q = in_vocabulary(candidates(logits, of(*rows)), vocabulary)
    cut = vllm_cuts(logits, rows)
    assert torch.equal(q > 0, cut > -torch.inf)
    torch.testing.assert_close(q, cut.softmax(-1), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 10**6), st.lists(samplings, min_size=1, max_size=4), st.sampled_from([65, 500, 5000]))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_of_a_large_vocabulary_the_likeliest_of_vllms(
    vllm_cuts: Callable[[Tensor, list[Sampling]], Tensor], seed: int, rows: list[Sampling], vocabulary: int
) -> None:
    logits = random_logits(seed, len(rows), vocabulary)
    assume(not any(on_an_edge(z, s) for z, s in zip(logits, rows, strict=True)))
    found = candidates(logits, of(*rows))
    values = vllm_cuts(logits, rows).topk(SUPPORT, dim=-1).values
    assert torch.equal(found.q > 0, values > -torch.inf)
    # By value, since either may come first of two tokens that are equally likely.
    z = logits / torch.tensor([s.temperature for s in rows]).unsqueeze(-1)
    assert torch.equal(z.gather(1, found.tokens)[found.q > 0], values[found.q > 0])
    assert all(len(set(row)) == SUPPORT for row in found.tokens.tolist())
    torch.testing.assert_close(found.q, values.softmax(-1), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 10**6), st.lists(samplings, min_size=1, max_size=4), st.sampled_from([3, 64, 300]))
@settings(max_examples=60, deadline=None)
def test_a_row_falls_and_sums_to_one_and_the_logits_stay(seed: int, rows: list[Sampling], vocabulary: int) -> None:
    logits = random_logits(seed, len(rows), vocabulary)
    logits[:, 1:] = logits[:, 1:].masked_fill(logits[:, 1:] < -2, -torch.inf)
    before = logits.clone()
    found = candidates(logits, of(*rows))
    assert torch.equal(logits, before)
    assert found.tokens.shape == found.q.shape == (len(rows), min(SUPPORT, vocabulary))
    assert found.tokens.dtype == torch.int64
    assert found.q.dtype == torch.float32
    assert (found.q[:, 1:] <= found.q[:, :-1]).all()
    assert (found.q[:, 0] > 0).all()
    assert (found.q[logits.gather(1, found.tokens) == -torch.inf] == 0).all()
    torch.testing.assert_close(found.q.sum(-1), torch.ones(len(rows)))


def test_candidates_by_hand() -> None:
    q = torch.tensor([0.1, 0.4, 0.3, 0.2])
    rows = [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=2),
        Sampling(1.0, top_p=0.35),  # .4 alone reaches it
        Sampling(1.0, top_p=0.45),
        Sampling(1.0, top_k=3, top_p=0.76),  # .4 / .9 + .3 / .9 = .78; of the whole, .7 would not have been enough
        Sampling(1.0, min_p=0.45),  # .2 = .5 of the largest
        Sampling(1.0, min_p=0.3, top_p=0.76),  # of the .9 that min-p leaves
        Sampling(1.0, min_p=1.0),
        Sampling(1.0, top_p=0.0),
    ]
    found = candidates(q.log().expand(len(rows), -1), of(*rows))
    assert found.tokens.tolist() == [[1, 2, 3, 0]] * len(rows)
    expected = [
        [4, 3, 2, 1],
        [16, 9, 4, 1],
        [4, 3, 0, 0],
        [1, 0, 0, 0],
        [4, 3, 0, 0],
        [4, 3, 0, 0],
        [4, 3, 2, 0],
        [4, 3, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
    ]
    weight = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found.q, weight / weight.sum(-1, keepdim=True))


def test_tokens_as_likely_as_the_kth_stay_as_in_vllm(
    vllm_cuts: Callable[[Tensor, list[Sampling]], Tensor],
) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    rows = [Sampling(0.7, top_k=3)]
    found = in_vocabulary(candidates(logits, of(*rows)), 6)
    assert torch.equal(found > 0, vllm_cuts(logits, rows) > -torch.inf)
    assert (found > 0).sum() == 4


def test_flat_tokens_beyond_the_support_count_for_top_p() -> None:
    logits = torch.linspace(0, -1e-3, 1000).repeat(2, 1)
    logits[:, 5] = math.log(1000.0)  # half of the mass; the others .0005 each
    q = candidates(logits, of(Sampling(1.0, top_p=0.505), Sampling(1.0, top_p=0.9))).q
    assert (q[0] > 0).sum() in (11, 12)
    assert (q[1] > 0).all()
    # Of 64 tokens alone the first reaches .9, whether a top-k leaves no others or there are no others.
    assert (candidates(logits[1:], of(Sampling(1.0, top_k=SUPPORT, top_p=0.9))).q > 0).sum() == 1
    assert (candidates(logits[1:, :SUPPORT], of(Sampling(1.0, top_p=0.9))).q > 0).sum() == 1


def test_a_top_k_above_the_support_is_none() -> None:
    logits = random_logits(4, 1, 500)
    plain, above = (candidates(logits, of(s)) for s in (Sampling(1.0), Sampling(1.0, top_k=100)))
    assert torch.equal(plain.q, above.q)
    nucleus, both = (candidates(logits, of(s)) for s in (Sampling(1.0, top_p=0.3), Sampling(1.0, 100, 0.3)))
    assert torch.equal(nucleus.q, both.q)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.01, 3, 0.5, 0.2), Sampling(1.0, top_p=0.5)])
def test_rows_with_little_or_nothing_in_them(sampling: Sampling) -> None:
    logits = torch.full((3, 200), -torch.inf)
    logits[0, 77] = 300.0
    logits[1, [3, 4]] = -1e35
    found = candidates(logits, of(sampling, sampling, sampling))
    assert found.tokens[0, 0] == 77
    torch.testing.assert_close(found.q[:2].sum(-1), torch.ones(2))
    assert found.q[0, 0] == 1
    assert set(found.tokens[1, :2].tolist()) == {3, 4}
    assert (found.q[2] == 0).all()


# --- Saguaro sampling ---


@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1)), min_size=1, max_size=5))
@settings(deadline=None)
def test_deflated_q_is_the_definition(seed: int, rows: list[tuple[int, float]]) -> None:
    q = random_q(seed, len(rows), 12)
    got = deflate(q, torch.tensor([f for f, _ in rows]), torch.tensor([c for _, c in rows]))
    assert (got[q == 0] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(len(rows)))
    for r, (f, c) in enumerate(rows):
        if q[r, f:].sum() == 0:  # all is within the first F
            assert torch.equal(got[r], q[r])
            continue
        weight = torch.cat((torch.tensor(c) * q[r, :f], q[r, f:])).double()
        torch.testing.assert_close(got[r].double(), weight / weight.sum(), rtol=1e-4, atol=1e-7)


def test_deflated_by_hand() -> None:
    q = torch.tensor([[0.5, 0.25, 0.25]] * 4)
    got = deflate(q, torch.tensor([1, 2, 1, 3]), torch.tensor([0.5, 0.0, 1.0, 0.0]))
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0, 0, 1], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(got, expected)


@given(st.integers(0, 10**6), st.integers(0, 20))
@settings(deadline=None)
def test_a_factor_of_one_changes_nothing_at_all(seed: int, fan_out: int) -> None:
    q = random_q(seed, 3, 12)
    q = q * torch.tensor([[1.0], [1 + 1e-6], [1 - 1e-6]])  # a sum that is 1 but for rounding
    assert torch.equal(deflate(q, torch.full((3,), fan_out), torch.ones(3)), q)


@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_smaller_factor_leaves_more_residual_on_the_first_tokens(seed: int, f: int, c: float, d: float) -> None:
    c, d = min(c, d), max(c, d)
    q, p = random_q(seed, 1, 12), random_q(seed + 7, 1, 12)
    fan_out = torch.tensor([f])

    def hit(factor: float) -> float:
        residual = (p - deflate(q, fan_out, torch.tensor([factor]))).clamp_min(0)
        return (residual[:, :f].sum() / residual.sum()).item()

    assume((q[:, f:] > 0).any())
    assert hit(c) >= hit(d) - 1e-4  # paper, Theorem 15


# --- draws ---


def wrong(q: Tensor) -> Tensor:
    """One hundredth of the mass moved, from the likeliest entry to the last possible one."""
    q = q.clone()
    q[0] -= 0.01
    q[int((q > 0).nonzero().max())] += 0.01
    return q


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_follow_q(seed: int) -> None:
    q = random_q(seed, 1, 16)[0]
    drawn = draw(q.expand(DRAWS, -1), torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.int64
    assert abs(distance(q, drawn)) < LIMIT
    assert distance(wrong(q), drawn) > 2 * LIMIT


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_coupled_choice_follows_q_as_well(seed: int) -> None:
    q = random_q(seed, 1, 16)[0]
    tokens = torch.randint(100_000, (16,), generator=torch.Generator().manual_seed(seed))
    noise_seeds = torch.randint(0, 2**31, (DRAWS,), generator=torch.Generator().manual_seed(seed))
    drawn = race(q.expand(DRAWS, -1), gumbel(noise_seeds, tokens.expand(DRAWS, -1)))
    assert drawn.dtype == torch.int64
    assert abs(distance(q, drawn)) < LIMIT
    assert distance(wrong(q), drawn) > 2 * LIMIT


def test_what_is_drawn_from_candidates_and_deflated_follows_the_deflated_q() -> None:
    found = candidates(random_logits(3, 1, 500), of(Sampling(0.8, top_k=12, top_p=0.9)))
    q = deflate(found.q, torch.tensor([3]), torch.tensor([0.5]))[0]
    drawn = draw(q.expand(DRAWS, -1), torch.Generator().manual_seed(1))
    assert abs(distance(q, drawn)) < LIMIT
    assert distance(found.q[0], drawn) > 2 * LIMIT


class Still(torch.Tensor):
    """A q whose exponential noise is all zeros: the worst that a generator may give."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.zero_() if func is torch.Tensor.exponential_ else out


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_an_entry_without_probability_is_never_drawn(seed: int) -> None:
    q = random_q(seed, 8, 12).flip(-1)
    g = torch.Generator().manual_seed(seed)
    extreme = torch.tensor([torch.inf, 1e300, 0.0, -4.0], dtype=torch.float64)
    noise = extreme[torch.randint(4, q.shape, generator=g)]
    for index in (draw(q, g), draw(q.as_subclass(Still), g).as_subclass(Tensor), race(q, noise)):
        assert (q.gather(1, index.unsqueeze(1)) > 0).all()


def test_draws_are_the_generators() -> None:
    q = random_q(0, 50, 64)
    a, b, c = (draw(q, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_with_the_same_seed_and_logits_the_draft_takes_what_vllm_takes() -> None:
    platforms = pytest.importorskip("vllm.platforms")
    platforms.current_platform.import_kernels()  # the build for this processor: another one ends the process
    if not hasattr(torch.ops._C, "fused_gumbel_argmax"):
        pytest.skip("this build of vLLM has no CPU sampler")
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    rows = [
        Sampling(1.0, seed=1),
        Sampling(0.6, seed=2),
        Sampling(1.5, top_k=9, seed=3),
        Sampling(1.0, 20, 0.8, seed=3),
    ]
    sampler = TopKTopPSampler()
    generators = {r: torch.Generator().manual_seed(sampling.seed) for r, sampling in enumerate(rows)}
    noise_seeds = [NoiseSeeds(sampling.seed) for sampling in rows]
    agreed, shifted = 0, 0
    for i in range(300):
        logits = random_logits(i, len(rows), 60, scale=1.0)
        z = logits / torch.tensor([s.temperature for s in rows]).unsqueeze(-1)
        k = torch.tensor([s.top_k or 60 for s in rows])
        theirs, _ = sampler.forward_cpu(z, generators, k, torch.tensor([s.top_p for s in rows]))
        found = candidates(logits, of(*rows))

        def ours(number: int, found: Candidates = found) -> Tensor:
            noise = gumbel(torch.tensor([seeds.at(number) for seeds in noise_seeds]), found.tokens)
            return found.tokens.gather(1, race(found.q, noise).unsqueeze(1)).squeeze(1)

        agreed += int((ours(i) == theirs).sum())
        shifted += int((ours(i + 1) == theirs).sum())
    assert agreed == 300 * len(rows)
    assert shifted < 100 * len(rows)  # with the noise of another position they would seldom agree
