from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.algorithm.outcomes import (
    NO_TOKEN,
    Outcomes,
    acceptance,
    accepted_length_distribution,
    allocated,
    choose,
    draft_distribution,
    outcome_probabilities,
    ranked,
    uniform_fan_out,
)

RULES = ("ranked", "geometric", "uniform")


def glue_output(
    seed: int, batch: int, num_drafts: int, vocabulary: int, sharpness: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random logits, drafts (the arg-max or any token), n and temperatures; NaN and absurd ids where padding is."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_drafts + 1, vocabulary, generator=g) * sharpness
    greedy = logits[:, :-1].argmax(-1)
    anything = torch.randint(vocabulary, (batch, num_drafts), generator=g)
    drafts = torch.where(torch.rand(batch, num_drafts, generator=g) < 0.7, greedy, anything)
    n = torch.randint(num_drafts + 1, (batch,), generator=g)
    temperature = torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (batch,), generator=g)]
    position = torch.arange(num_drafts + 1)
    logits = logits.masked_fill((position > n[:, None])[..., None], torch.nan)
    drafts = torch.where(position[:-1] < n[:, None], drafts, torch.tensor([-1, 10**6])[position[:-1] % 2])
    return logits, drafts, n, temperature


def pairs(outcomes: Outcomes, row: int) -> list[tuple[int, int]]:
    """The real outcomes of a row, without the marked entries."""
    both = zip(outcomes.accepted[row].tolist(), outcomes.bonus[row].tolist(), strict=True)
    return [(k, t) for k, t in both if t != NO_TOKEN]


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 3),
        "num_drafts": st.integers(0, 6),
        "vocabulary": st.sampled_from([30, 64, 1500, 2051]),
    }
)
branch_counts = st.integers(1, 24)


# --- probabilities ---


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_the_whole_outcome_space_has_probability_one(shape: dict[str, int]) -> None:
    logits, drafts, n, temperature = glue_output(**shape)
    p = outcome_probabilities(logits, drafts, n, temperature)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum((1, 2)), torch.ones(len(n)), atol=1e-4, rtol=0)


def test_accepted_length_by_hand() -> None:
    a = torch.tensor([[0.9, 0.5, 0.2], [0.9, 0.5, torch.nan], [torch.nan, torch.nan, torch.nan]])
    got = accepted_length_distribution(a, torch.tensor([3, 2, 0]))
    expected = torch.tensor([[0.1, 0.45, 0.36, 0.09], [0.1, 0.45, 0.45, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(got, expected)


def test_outcome_probabilities_by_hand() -> None:
    q = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    p = outcome_probabilities(q.log(), torch.tensor([[0]]), torch.tensor([1]), torch.tensor([1.0]))
    # k = 0: (1 - .5) [.3 .2] / (1 - .5), token 0 was rejected; k = 1: .5 q_1
    torch.testing.assert_close(p, torch.tensor([[[0.0, 0.3, 0.2], [0.05, 0.05, 0.4]]]))


def test_temperature_sharpens_the_prediction_and_greedy_takes_the_logits_as_they_are() -> None:
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    q = draft_distribution(logits, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(q[0], logits[0].softmax(-1))
    torch.testing.assert_close(q[1], logits[1].softmax(-1))
    torch.testing.assert_close(q[2], (2 * logits[2]).softmax(-1))


def test_acceptance_of_a_greedy_target_is_higher_than_q() -> None:
    q = torch.full((2, 2, 4), 0.25)
    a = acceptance(q, torch.tensor([[3], [3]]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(a, torch.tensor([[0.25**0.3], [0.25]]))


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_draft_token_that_is_certain(rule: str, temperature: float) -> None:
    logits = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(3))
    logits[0, 0, 5] = 400.0  # q_0(x_1) = 1 in float32: k = 0 cannot be
    drafts, n, t = torch.tensor([[5, 7]]), torch.tensor([2]), torch.tensor([temperature])
    p = outcome_probabilities(logits, drafts, n, t)
    assert p.isfinite().all()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    assert p[0, 0].sum() == 0
    outcomes = choose(rule, logits, drafts, n, t, 12)
    assert outcomes.probability.isfinite().all()
    assert (0, 5) not in pairs(outcomes, 0)
    if rule == "ranked":
        assert len(pairs(outcomes, 0)) == 12
        assert (outcomes.accepted > 0).all()


def test_low_temperature_keeps_the_order_of_the_tail() -> None:
    logits = torch.linspace(8, -8, 50).view(1, 1, 50)  # at T = .01 all but one token underflow
    outcomes = ranked(logits, torch.empty(1, 0, dtype=torch.int64), torch.tensor([0]), torch.tensor([0.01]), 12)
    assert outcomes.bonus.tolist() == [list(range(12))]


# --- what every rule must keep ---


@pytest.mark.parametrize("rule", RULES)
@given(shape=shapes, branches=branch_counts)
@settings(max_examples=60, deadline=None)
def test_outcomes_are_possible_and_distinct(rule: str, shape: dict[str, int], branches: int) -> None:
    logits, drafts, n, temperature = glue_output(**shape)
    before = logits.clone()
    outcomes = choose(rule, logits, drafts, n, temperature, branches)
    torch.testing.assert_close(logits, before, equal_nan=True, atol=0, rtol=0)
    table = outcome_probabilities(logits, drafts, n, temperature)

    for field in (outcomes.accepted, outcomes.bonus, outcomes.probability):
        assert field.shape == (len(n), branches)
    for row in range(len(n)):
        found = pairs(outcomes, row)
        assert len(set(found)) == len(found)
        for k, t in found:
            assert 0 <= k <= n[row]
            assert 0 <= t < shape["vocabulary"]
            assert k == n[row] or t != drafts[row, k], "a rejected draft token is never the bonus token"
        possible = outcomes.bonus[row] != NO_TOKEN
        expected = table[row, outcomes.accepted[row], outcomes.bonus[row].clamp_min(0)]
        torch.testing.assert_close(outcomes.probability[row], expected * possible, atol=1e-5, rtol=1e-3)
        if rule == "ranked":
            assert len(found) == branches


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_excluded_once_all_drafts_are_accepted(rule: str) -> None:
    # Two drafts of three are real; the padding repeats the token that is likeliest at k = 2.
    logits = torch.zeros(1, 4, 40)
    logits[0, 2, 9] = 10.0
    outcomes = choose(rule, logits, torch.tensor([[1, 2, 9]]), torch.tensor([2]), torch.tensor([0.0]), 8)
    assert (2, 9) in pairs(outcomes, 0)


@pytest.mark.parametrize("rule", RULES)
def test_after_a_miss_all_branches_stand_at_zero_accepted(rule: str) -> None:
    logits, drafts, _, temperature = glue_output(1, 1, 4, 50)
    logits[0, 0] = torch.randn(50, generator=torch.Generator().manual_seed(1))
    outcomes = choose(rule, logits, drafts, torch.tensor([0]), temperature, 10)
    assert outcomes.accepted.tolist() == [[0] * 10]
    assert outcomes.bonus[0].tolist() == logits[0, 0].topk(10).indices.tolist()


def test_an_unknown_rule() -> None:
    logits, drafts, n, temperature = glue_output(1, 1, 2, 40)
    with pytest.raises(ValueError, match="none of ranked, geometric, uniform"):
        choose("best", logits, drafts, n, temperature, 4)


# --- ranked ---


@given(shape=shapes, branches=branch_counts)
@settings(max_examples=60, deadline=None)
def test_ranked_is_the_top_of_the_whole_table(shape: dict[str, int], branches: int) -> None:
    logits, drafts, n, temperature = glue_output(**shape)
    table = outcome_probabilities(logits, drafts, n, temperature)
    best = table.flatten(1).topk(min(branches, table[0].numel()), dim=1).values
    got = ranked(logits, drafts, n, temperature, branches).probability
    torch.testing.assert_close(got[:, : best.shape[1]], best, atol=1e-5, rtol=1e-3)
    assert (got.diff(dim=1) <= 0).all()


@given(shape=shapes, branches=branch_counts, rule=st.sampled_from(["geometric", "uniform"]))
@settings(max_examples=60, deadline=None)
def test_no_fixed_fan_out_covers_more_than_ranked(shape: dict[str, int], branches: int, rule: str) -> None:
    arguments = glue_output(**shape)
    best = ranked(*arguments, branches).probability.sum(1)
    assert (choose(rule, *arguments, branches).probability.sum(1) <= best + 1e-5).all()


@pytest.mark.parametrize("rule", RULES)
def test_more_branches_than_outcomes_leaves_marked_entries(rule: str) -> None:
    # Vocabulary 3, one draft: 2 outcomes at k = 0 and 3 at k = 1.
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    outcomes = choose(rule, logits, torch.tensor([[1]]), torch.tensor([1]), torch.tensor([1.0]), 16)
    assert outcomes.bonus.shape == (1, 16)
    assert set(pairs(outcomes, 0)) == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}
    marked = outcomes.bonus[0] == NO_TOKEN
    assert marked.sum() == 11
    assert (outcomes.probability[0][marked] == 0).all()
    assert (outcomes.accepted[0][marked] == 0).all()
    torch.testing.assert_close(outcomes.probability.sum(), torch.tensor(1.0))


def test_masked_vocabulary_is_never_predicted() -> None:
    logits = torch.randn(1, 3, 60, generator=torch.Generator().manual_seed(0))
    logits[..., 20:] = -torch.inf
    outcomes = ranked(logits, torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([0.0]), 70)
    assert len(pairs(outcomes, 0)) == 19 + 19 + 20
    assert (outcomes.bonus < 20).all()


def test_a_vocabulary_of_one_token() -> None:
    outcomes = ranked(torch.zeros(1, 2, 1), torch.tensor([[0]]), torch.tensor([1]), torch.tensor([0.0]), 4)
    assert pairs(outcomes, 0) == [(1, 0)]
    assert outcomes.probability.tolist() == [[1.0, 0.0, 0.0, 0.0]]


# --- allocated ---


def test_each_row_has_its_own_fan_out() -> None:
    logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(5))
    drafts = logits[:, :-1].argmax(-1)
    n, temperature = torch.tensor([3, 1]), torch.zeros(2)
    fan_out = torch.tensor([[1, 2, 0, 4], [5, 2, 99, 99]])  # what stands beyond n is ignored
    outcomes = allocated(logits, drafts, n, temperature, fan_out, 7)
    assert outcomes.accepted.tolist() == [[0, 1, 1, 3, 3, 3, 3], [0, 0, 0, 0, 0, 1, 1]]
    top = logits.topk(6).indices
    assert outcomes.bonus[0].tolist() == [top[0, 0, 1], *top[0, 1, 1:3], *top[0, 3, :4]]
    assert outcomes.bonus[1].tolist() == [*top[1, 0, 1:6], *top[1, 1, :2]]


def test_one_fan_out_for_all_rows_may_be_a_list() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(5))
    outcomes = allocated(logits, logits[:, :-1].argmax(-1), torch.tensor([2, 2]), torch.zeros(2), [2, 1, 3], 6)
    assert outcomes.accepted.tolist() == [[0, 0, 1, 2, 2, 2]] * 2


def test_uniform_gives_each_row_the_shares_of_its_own_n() -> None:
    logits = torch.randn(5, 5, 64, generator=torch.Generator().manual_seed(7))
    n = torch.arange(5)
    outcomes = choose("uniform", logits, logits[:, :-1].argmax(-1), n, torch.zeros(5), 12)
    for row in range(5):
        counts = torch.bincount(outcomes.accepted[row], minlength=row + 1).tolist()
        assert counts == uniform_fan_out(row, 12)


# --- do the predictions come true? ---


@pytest.mark.parametrize(("temperature", "disagreement"), [(1.0, 1.0), (0.0, 0.3)], ids=["calibrated", "crude"])
def test_ranked_hits_more_often_than_fixed_fan_outs(temperature: float, disagreement: float) -> None:
    """A simulated target takes the arg-max of the draft's logits plus Gumbel noise.

    Noise of scale 1 makes its tokens samples of q, so that a = q(x) is exactly right; scale .3 makes it agree with the
    draft more often than q says, as greedy targets do, and a = q(x)^.3 is a guess.
    """
    rounds, num_drafts, vocabulary, branches = 3000, 4, 64, 12
    g = torch.Generator().manual_seed(11)
    confidence = 4 * torch.rand(rounds, num_drafts + 1, 1, generator=g)  # the draft is sure here and unsure there
    logits = torch.randn(rounds, num_drafts + 1, vocabulary, generator=g) * confidence
    drafts = logits[:, :-1].argmax(-1)
    gumbel = -torch.empty_like(logits).exponential_(generator=g).log()
    target = (logits + disagreement * gumbel).argmax(-1)

    k = (target[:, :-1] == drafts).long().cumprod(1).sum(1, keepdim=True)
    t = target.gather(1, k)
    n = torch.full((rounds,), num_drafts)
    hit_rate, predicted = {}, {}
    for rule in RULES:
        outcomes = choose(rule, logits, drafts, n, torch.full((rounds,), temperature), branches)
        hits = ((outcomes.accepted == k) & (outcomes.bonus == t)).any(1)
        hit_rate[rule] = hits.float().mean().item()
        predicted[rule] = outcomes.probability.sum(1).mean().item()
    assert hit_rate["ranked"] > hit_rate["uniform"] + 0.02
    assert hit_rate["ranked"] > hit_rate["geometric"] + 0.02
    if disagreement == 1.0:
        for rule in RULES:  # three standard deviations of 3000 rounds
            assert hit_rate[rule] == pytest.approx(predicted[rule], abs=0.03)


def test_agrees_with_enumeration_of_every_verification() -> None:
    """Against the definition: go through the drafts one by one, for a target that samples from the draft's own q."""
    logits, drafts, _, _ = glue_output(2, 1, 2, 5, sharpness=1.0)
    logits, drafts, n = logits.nan_to_num(0.5), torch.tensor([[1, 4]]), torch.tensor([2])
    q = logits.softmax(-1)[0]
    expected = torch.zeros(3, 5)
    for tokens in itertools.product(range(5), repeat=3):
        chance = q[0, tokens[0]] * q[1, tokens[1]] * q[2, tokens[2]]
        k = 0
        while k < 2 and tokens[k] == drafts[0, k]:
            k += 1
        expected[k, tokens[k]] += chance
    torch.testing.assert_close(outcome_probabilities(logits, drafts, n, torch.tensor([1.0]))[0], expected)
