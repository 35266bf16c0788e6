from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.unit.drafting.checks import COUPLED, GREEDY, POSITIONED, SAMPLED, SEEDED, make_engine, noise_at
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.drawing import Drawer
from vllm_saguaro.drafting.trunk import PLAIN, Deflation, Drawing, DrawRule, Trunk
from vllm_saguaro.messages import Sampling

K, VOCABULARY, POSITION = 3, 500, 9
CUTS = [Sampling(top_k=5), Sampling(top_p=0.6), Sampling(min_p=0.2), Sampling(top_k=20, top_p=0.8, min_p=0.05)]


def drawer_of(method: str = "coupled", vocabulary: int = VOCABULARY, seed: int | None = 3) -> Drawer:
    return Drawer(method, FakeModel(vocab_size=vocabulary), seed)


def rule_of(
    drawer: Drawer, samplings: Sequence[Sampling], deflation: Deflation = PLAIN, position: int = POSITION
) -> DrawRule:
    """A row for each of these samplings, whose bonus tokens are at `position`."""
    engine = make_engine(FakeModel())
    rows = [(engine.admit([1] * position, sampling), position) for sampling in samplings]
    return drawer.rule(rows, K, deflation)


def random_logits(rows: int, sharpness: float = 2.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return sharpness * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))


def cut(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """log q [V] of what min-p, top-k and top-p leave, one after the other."""
    q = (logits / sampling.temperature).softmax(-1)
    q[q < sampling.min_p * q.max()] = 0
    if sampling.top_k:
        q[q < q.topk(sampling.top_k).values[-1]] = 0
    q /= q.sum()
    if sampling.top_p < 1:
        value, order = q.sort(descending=True)
        q[order[(value.cumsum(0) - value >= sampling.top_p).nonzero()]] = 0
    return q.log()


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("coupled", [Drawing.CERTAIN, Drawing.SAMPLED, Drawing.COUPLED, Drawing.COUPLED]),
        ("probabilistic", [Drawing.CERTAIN, Drawing.SAMPLED, Drawing.COUPLED, Drawing.COUPLED]),
        ("greedy", [Drawing.CERTAIN, Drawing.CERTAIN, Drawing.COUPLED, Drawing.COUPLED]),
    ],
)
def test_which_kind_a_request_is(method: str, kinds: list[Drawing]) -> None:
    """The target says whether noise is known; the method decides of the others."""
    drawer = drawer_of(method)
    assert [drawer.kind(sampling) for sampling in (GREEDY, SAMPLED, COUPLED, SEEDED)] == kinds
    assert drawer.kind(replace(COUPLED, temperature=0.0)) is Drawing.CERTAIN


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="none of coupled, probabilistic, greedy"):
        drawer_of("best")


# ---- certain --------------------------------------------------------------------------------------------------------


def test_certain_rows_take_the_likeliest_token_at_every_temperature() -> None:
    drawer = drawer_of("greedy")
    rule = rule_of(drawer, [GREEDY, SAMPLED, replace(SAMPLED, top_k=2)])
    assert rule.all_certain
    logits = random_logits(3)
    tokens, q = drawer.draw(logits, rule, 0)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert q is None


# ---- coupled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [COUPLED, SEEDED, POSITIONED])
def test_coupled_rows_take_what_their_noise_picks_of_the_whole_vocabulary(sampling: Sampling) -> None:
    drawer, rows = drawer_of(), 40
    samplings = [replace(sampling, seed=seed, prompt_length=seed % POSITION) for seed in range(rows)]
    rule = rule_of(drawer, samplings)
    logits = random_logits(rows, sharpness=0.5)
    beyond = 0
    for depth in range(K):
        tokens, q = drawer.draw(logits, rule, depth)
        assert q is None
        for z, token, own in zip(logits, tokens.tolist(), samplings, strict=True):
            # the bonus token is at `POSITION`, the draft of depth 0 comes after it
            noise = noise_at(own, POSITION + 1 + depth, VOCABULARY)
            assert token == (z.double() / own.temperature + noise).argmax()
            beyond += token not in z.topk(64).indices
    assert beyond > 10, "no draft shows that the whole vocabulary is in the race"


@pytest.mark.parametrize("coupled", [COUPLED, POSITIONED], ids=["integers", "positions"])
@pytest.mark.parametrize("cuts", CUTS, ids=["top-k", "top-p", "min-p", "all"])
def test_coupled_rows_stay_within_their_own_cuts(cuts: Sampling, coupled: Sampling) -> None:
    drawer, rows = drawer_of(), 60
    cuts = replace(cuts, temperature=coupled.temperature, noise=coupled.noise)
    samplings = [replace(cuts if seed % 2 else coupled, seed=seed) for seed in range(rows)]
    logits = random_logits(rows)
    tokens, _ = drawer.draw(logits, rule_of(drawer, samplings), 1)
    other = 0
    for z, token, own in zip(logits, tokens.tolist(), samplings, strict=True):
        noise = noise_at(own, POSITION + 2, VOCABULARY)
        assert token == (cut(z, own).double() + noise).argmax()
        other += own.cut and token != (z.double() / own.temperature + noise).argmax()
    assert other > 3, "no draft shows that the cuts matter"


# ---- sampled --------------------------------------------------------------------------------------------------------


def deflated(q: torch.Tensor, fan_out: int, c: float) -> torch.Tensor:
    """sigma_{F,C} of q [V]: the F likeliest tokens times C, made to sum to 1 again."""
    q = q.clone()
    q[q.topk(fan_out).indices] *= c
    return q / q.sum()


def chi_square(tokens: torch.Tensor, q: torch.Tensor) -> float:
    """sum (observed - expected)^2 / expected over the tokens that q allows."""
    observed, expected = torch.bincount(tokens, minlength=len(q)), q * len(tokens)
    assert observed[q == 0].sum() == 0
    return float(((observed - expected)[q > 0] ** 2 / expected[q > 0]).sum())


@pytest.mark.parametrize("deflation", [PLAIN, Deflation((2, 0, 1), 0.3), Deflation((3, 1, 2), 0.0)])
@pytest.mark.parametrize("depth", range(K))
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "among others"])
def test_sampled_drafts_are_distributed_as_the_published_q(deflation: Deflation, depth: int, mixed: bool) -> None:
    rows, vocabulary = 20_000, 12
    drawer = drawer_of("probabilistic", vocabulary)
    rule = rule_of(drawer, [SAMPLED, GREEDY, COUPLED] if mixed else [SAMPLED], deflation)
    index = torch.arange(rows) % 3 if mixed else torch.zeros(rows, dtype=torch.int64)
    logits = random_logits(1, 1.0, vocabulary)
    tokens, q = drawer.draw(logits.expand(rows, -1), rule.take(index), depth)
    assert q is not None
    fan_out = (*deflation.fan_out, 0, 0, 0)[depth]
    expected = deflated((logits[0] / SAMPLED.temperature).softmax(-1), fan_out, deflation.c)
    sampled = index == 0
    dense = torch.zeros(rows, vocabulary).scatter(1, q.tokens, q.q)
    torch.testing.assert_close(dense[sampled], expected.expand(int(sampled.sum()), -1))
    # 11 degrees of freedom or fewer: once in 10,000 seeds beyond
    assert chi_square(torch.from_numpy(tokens)[sampled], expected) < 37.4


@pytest.mark.parametrize("cuts", CUTS, ids=["top-k", "top-p", "min-p", "all"])
def test_a_token_that_the_requests_cuts_exclude_is_never_sampled(cuts: Sampling) -> None:
    rows, sampling = 5000, replace(cuts, temperature=0.9)
    drawer = drawer_of("probabilistic")
    logits = random_logits(1)
    tokens, q = drawer.draw(logits.expand(rows, -1), rule_of(drawer, [sampling]).take(torch.zeros(rows).long()), 0)
    allowed = cut(logits[0], sampling).isfinite()
    assert 1 < allowed.sum() < 64
    assert allowed[torch.from_numpy(tokens)].all()
    assert q is not None
    assert set(q.tokens[0][q.q[0] > 0].tolist()) == set(allowed.nonzero().flatten().tolist())


# ---- mixed ----------------------------------------------------------------------------------------------------------


def test_rows_of_every_kind_draw_in_one_tree_as_they_do_alone() -> None:
    samplings = [SAMPLED, COUPLED, GREEDY, replace(SEEDED, top_k=4), replace(SAMPLED, temperature=1.5)]
    deflation, logits = Deflation((2, 2, 2), 0.2), random_logits(5)
    drawer = drawer_of("probabilistic")
    rule = rule_of(drawer, samplings, deflation)
    assert rule.kinds == {Drawing.SAMPLED, Drawing.COUPLED, Drawing.CERTAIN}
    for depth in range(K):
        tokens, q = drawer.draw(logits, rule, depth)
        assert q is not None
        for row, sampling in enumerate(samplings):
            alone = rule_of(drawer, [sampling], deflation)
            token, own = drawer.draw(logits[row : row + 1], alone, depth)
            if drawer.kind(sampling) is Drawing.SAMPLED:
                assert own is not None
                torch.testing.assert_close(q.q[row], own.q[0])
                assert q.q[row][q.tokens[row] == int(tokens[row])] > 0
            else:
                assert tokens[row] == token[0]


def test_a_part_of_a_rule_is_the_rule_of_that_part() -> None:
    drawer = drawer_of("probabilistic")
    samplings = [SAMPLED, COUPLED, GREEDY, replace(SAMPLED, top_k=3, temperature=1.5)]
    part = rule_of(drawer, samplings, Deflation((1,), 0.5)).take(torch.tensor([3, 1]))
    whole = rule_of(drawer, [samplings[3], samplings[1]], Deflation((1,), 0.5))
    for got, expected in (
        (part.kind, whole.kind),
        (part.temperature, whole.temperature),
        (part.noise, whole.noise),
        (part.fan_out, whole.fan_out),
        (part.c, whole.c),
    ):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)
    assert part.rows is not None
    assert part.rows.top_k.tolist() == [3, 0]
    assert part.deflation == whole.deflation


def test_only_sampled_rows_are_deflated() -> None:
    rule = rule_of(drawer_of("probabilistic"), [SAMPLED, COUPLED, GREEDY], Deflation((1,), 0.5))
    assert rule.c.tolist() == [0.5, 1.0, 1.0]
    assert rule.fan_out.tolist() == [[1, 0, 0]] * 3


# ---- random numbers -------------------------------------------------------------------------------------------------


def sampled_tokens(seed: int | None, rows: int = 200) -> list[int]:
    drawer = drawer_of("probabilistic", seed=seed)
    rule = rule_of(drawer, [SAMPLED]).take(torch.zeros(rows).long())
    return drawer.draw(random_logits(1).expand(rows, -1), rule, 0)[0].tolist()


def test_the_drawer_has_random_numbers_of_its_own() -> None:
    """The verifier's must not be touched: what is proposed may not depend on the coin that judges it."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampled_tokens(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert sampled_tokens(3) == first
    assert sampled_tokens(4) != first


def test_without_a_seed_no_two_drawers_draw_alike() -> None:
    torch.manual_seed(0)
    first = sampled_tokens(None)
    torch.manual_seed(0)
    assert sampled_tokens(None) != first


def test_a_request_without_noise_has_none() -> None:
    assert Trunk([1, 2], SAMPLED).noise_seeds(5, 3) == [0, 0, 0]
