from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.algorithm.calibration import BINS, HIGHEST, LOWEST, NUM_CLASSES, Calibration, Event, class_of
from vllm_saguaro.algorithm.outcomes import (
    NO_TOKEN,
    Beliefs,
    Outcomes,
    accepted_length_distribution,
    allocated,
    choose,
    outcome_log_probabilities,
    ranked,
    scores,
    uniform_fan_out,
)
from vllm_saguaro.algorithm.sampling import deflate

RULES = ("ranked", "uncalibrated", "geometric", "uniform")
SAMPLED = class_of(1.0, coupled=False, certain=False, backup=False)
WIDTH = 18 / BINS
CENTRES = [-9 + WIDTH * (b + 0.5) for b in range(BINS)]
IDENTITY = torch.tensor([*CENTRES, 1.0]).expand(NUM_CLASSES, len(Event), BINS + 1).contiguous()
"""Maps that take a score for the probability; the bonus token is always a candidate."""
PRIOR = Calibration().table().clamp(max=7.0)
"""The prior, but with no acceptance so close to 1 that 1 - a is coarse in float32."""


def believed(share: Tensor, drafts: Tensor, n: Tensor, *, drawn: Tensor | None = None, cls: int = SAMPLED) -> Beliefs:
    """Beliefs over the tokens 0 .. M - 1 of rows of one class."""
    tokens = torch.arange(share.shape[-1]).expand(share.shape)
    return Beliefs(tokens, share, share if drawn is None else drawn, drafts, n, torch.full_like(n, cls))


def random_beliefs(seed: int, batch: int, num_drafts: int, per_position: int, *, padding: float = math.nan) -> Beliefs:
    """Any beliefs: some tokens impossible, some rows deflated, drafts among the candidates or not, any n and class.

    What is padding holds `padding`, and ids that do not exist.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (batch, num_drafts + 1, per_position)
    share = (3 * torch.randn(shape, generator=g)).softmax(-1).sort(dim=-1, descending=True).values
    share = torch.where(torch.rand(shape, generator=g) < 0.9, share, 0.0)
    share[..., 0] = share[..., 0].clamp_min(0.1)
    share = share.sort(dim=-1, descending=True).values
    share = share / share.sum(-1, keepdim=True)
    fan_out = torch.randint(per_position + 1, shape[:2], generator=g)
    c = torch.tensor([1.0, 0.5, 0.0])[torch.randint(3, shape[:1], generator=g)].unsqueeze(1).expand(shape[:2])
    drawn = deflate(share.flatten(0, 1), fan_out.flatten(), c.flatten()).view(shape)
    tokens = torch.rand(*shape[:2], 3 * per_position, generator=g).argsort(-1)[..., :per_position]
    likeliest, anything = tokens[:, :-1, 0], torch.randint(3 * per_position, (batch, num_drafts), generator=g)
    drafts = torch.where(torch.rand(batch, num_drafts, generator=g) < 0.6, likeliest, anything)
    n = torch.randint(num_drafts + 1, (batch,), generator=g)
    position = torch.arange(num_drafts + 1)
    beyond = (position > n[:, None])[..., None]
    share, drawn = share.masked_fill(beyond, padding), drawn.masked_fill(beyond, padding)
    drafts = torch.where(position[:-1] < n[:, None], drafts, torch.tensor([-1, 10**6])[position[:-1] % 2])
    classes = torch.randint(NUM_CLASSES, (batch,), generator=g)
    return Beliefs(tokens, share, drawn, drafts, n, classes)


def taught(seed: int) -> Tensor:
    """A table of maps that have learnt any rising relation."""
    g = torch.Generator().manual_seed(seed)
    rises = torch.empty(NUM_CLASSES, len(Event), BINS).uniform_(0.01, 0.6, generator=g)
    covered = torch.empty(NUM_CLASSES, len(Event), 1).uniform_(0.2, 1, generator=g)
    return torch.cat((rises.cumsum(-1) - 9, covered), dim=-1)


def mapped(table: Tensor, cls: int, what: Event, raw: float) -> float:
    """One look-up in plain Python."""
    nodes = table[cls, what].tolist()
    x = math.log(max(raw, 1e-37)) - math.log1p(-min(raw, 1 - 2**-24))
    at = min(max((x - CENTRES[0]) / WIDTH, 0.0), BINS - 1)
    left = min(int(at), BINS - 2)
    value = nodes[left] + (nodes[left + 1] - nodes[left]) * (at - left)
    value += min(x - CENTRES[0], 0.0) if what is not Event.ACCEPTANCE else 0.0
    return min(max(1 / (1 + math.exp(-value)), LOWEST), HIGHEST)


def plain(beliefs: Beliefs, table: Tensor, row: int) -> dict[tuple[int, int], float]:
    """The definition: every possible outcome (k, t*) of a row, and its probability."""
    n, cls = int(beliefs.n[row]), int(beliefs.classes[row])
    found: dict[tuple[int, int], float] = {}
    reached = 1.0
    for k in range(n + 1):
        tokens = beliefs.tokens[row, k].tolist()
        q, drawn = beliefs.share[row, k].tolist(), beliefs.drawn[row, k].tolist()
        if k == n:
            stops, what, score = reached, Event.BONUS, q
        else:
            draft = int(beliefs.drafts[row, k])
            a = mapped(table, cls, Event.ACCEPTANCE, sum(p for t, p in zip(tokens, q, strict=True) if t == draft))
            stops, what, reached = reached * (1 - a), Event.RESIDUAL, reached * a
            # what p has beyond q', for p that is q but for a twentieth
            left = [max(p - d, 0) + 0.05 * p for p, d in zip(q, drawn, strict=True)]
            left = [0.0 if t == draft else w for t, w in zip(tokens, left, strict=True)]
            score = [w / max(sum(left), 1e-37) for w in left]
        weights = {t: mapped(table, cls, what, s) for t, s in zip(tokens, score, strict=True) if s > 0}
        covered = float(table[cls, what, BINS])
        found |= {(k, t): stops * covered * weight / sum(weights.values()) for t, weight in weights.items()}
    return found


def pairs(outcomes: Outcomes, row: int) -> list[tuple[int, int]]:
    """The real outcomes of a row, without the marked entries."""
    both = zip(outcomes.accepted[row].tolist(), outcomes.bonus[row].tolist(), strict=True)
    return [(k, t) for k, t in both if t != NO_TOKEN]


def chosen(rule: str, beliefs: Beliefs, table: Tensor, branches: int) -> Outcomes:
    return choose(rule, beliefs, scores(beliefs), table, branches)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 3),
        "num_drafts": st.integers(0, 5),
        "per_position": st.sampled_from([1, 2, 7, 16]),
        "padding": st.sampled_from([0.0, math.nan, math.inf]),
    }
)
branch_counts = st.integers(1, 24)
tables = st.one_of(st.just(IDENTITY), st.just(PRIOR), st.integers(0, 2**31).map(taught))


# --- probabilities ---


@given(shapes, tables)
@settings(max_examples=100, deadline=None)
def test_probabilities_equal_the_plain_definition(shape: dict[str, int], table: Tensor) -> None:
    beliefs = random_beliefs(**shape)
    got = outcome_log_probabilities(beliefs, scores(beliefs), table)
    assert got.shape == beliefs.tokens.shape
    for row in range(shape["batch"]):
        expected = plain(beliefs, table, row)
        possible = {}
        for k, t in (got[row] > -torch.inf).nonzero().tolist():
            possible[k, int(beliefs.tokens[row, k, t])] = got[row, k, t].item()
        assert possible.keys() == expected.keys()
        for outcome, value in possible.items():
            assert value == pytest.approx(math.log(expected[outcome]), abs=2e-3)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_scores_leave_the_beliefs_alone(shape: dict[str, int]) -> None:
    beliefs = random_beliefs(**shape)
    before = [x.clone() for x in (beliefs.share, beliefs.drawn, beliefs.tokens, beliefs.drafts)]
    chosen("ranked", beliefs, IDENTITY, 8)
    for x, copy in zip((beliefs.share, beliefs.drawn, beliefs.tokens, beliefs.drafts), before, strict=True):
        torch.testing.assert_close(x, copy, equal_nan=True, atol=0, rtol=0)


def test_scores_by_hand() -> None:
    share = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    raw = scores(believed(share, torch.tensor([[0]]), torch.tensor([1])))
    torch.testing.assert_close(raw.accept, torch.tensor([[0.5]]))
    # token 0 was rejected: [.3 .2] / .5
    torch.testing.assert_close(raw.token, torch.tensor([[[0.0, 0.6, 0.4], [0.1, 0.1, 0.8]]]))


def test_what_deflation_took_away_is_likely_after_a_rejection() -> None:
    share = torch.tensor([[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]])
    drawn = deflate(share[0], torch.tensor([2, 2]), torch.tensor([0.5, 0.5]))[None]  # [.25 .15 .2] / .6
    raw = scores(believed(share, torch.tensor([[2]]), torch.tensor([1]), drawn=drawn))
    # [.5 - .4167 + .025, .3 - .25 + .015, -] : token 2 was drawn, and more often than q has it
    left = torch.tensor([0.5 - 0.25 / 0.6 + 0.025, 0.3 - 0.15 / 0.6 + 0.015, 0.0])
    torch.testing.assert_close(raw.token[0, 0], left / left.sum())
    torch.testing.assert_close(raw.token[0, 1], share[0, 1])  # with all accepted nothing is left over
    torch.testing.assert_close(raw.accept, torch.tensor([[0.2]]))


def test_a_draft_that_is_no_candidate_has_no_score() -> None:
    share = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]])
    raw = scores(believed(share, torch.tensor([[9]]), torch.tensor([1])))
    assert raw.accept.tolist() == [[0.0]]
    torch.testing.assert_close(raw.token[0, 0], share[0, 0])


def test_accepted_length_by_hand() -> None:
    a = torch.tensor([[0.9, 0.5, 0.2], [0.9, 0.5, torch.nan], [torch.nan, torch.nan, torch.nan]])
    got = accepted_length_distribution(a, torch.tensor([3, 2, 0]))
    expected = torch.tensor([[0.1, 0.45, 0.36, 0.09], [0.1, 0.45, 0.45, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(got, expected)


def test_agrees_with_enumeration_of_every_verification() -> None:
    """Go through the drafts one by one, for a target that samples from the draft's own q."""
    share = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(2)).softmax(-1)
    drafts = torch.tensor([[1, 4]])
    expected = torch.zeros(3, 5)
    for tokens in itertools.product(range(5), repeat=3):
        k = 0
        while k < 2 and tokens[k] == drafts[0, k]:
            k += 1
        expected[k, tokens[k]] += math.prod(share[0, j, t].item() for j, t in enumerate(tokens))
    beliefs = believed(share, drafts, torch.tensor([2]))
    got = outcome_log_probabilities(beliefs, scores(beliefs), IDENTITY).exp()[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))


# --- what every rule must keep ---


@pytest.mark.parametrize("rule", RULES)
@given(shape=shapes, branches=branch_counts, table=tables)
@settings(max_examples=60, deadline=None)
def test_outcomes_are_possible_and_distinct(rule: str, shape: dict[str, int], branches: int, table: Tensor) -> None:
    beliefs = random_beliefs(**shape)
    outcomes = chosen(rule, beliefs, table, branches)
    for field in (outcomes.accepted, outcomes.bonus, outcomes.probability):
        assert field.shape == (shape["batch"], branches)
    for row in range(shape["batch"]):
        expected, found = plain(beliefs, table, row), pairs(outcomes, row)
        assert len(set(found)) == len(found)
        assert set(found) <= expected.keys()
        real = outcomes.bonus[row] != NO_TOKEN
        assert outcomes.probability[row][real].tolist() == pytest.approx([expected[p] for p in found], rel=3e-3)
        assert (outcomes.probability[row][~real] == 0).all()
        assert (outcomes.accepted[row][~real] == 0).all()
        if rule in ("ranked", "uncalibrated"):
            assert len(found) == min(branches, len(expected))
            best = sorted(expected.values(), reverse=True)[: len(found)]
            assert outcomes.probability[row][: len(found)].tolist() == pytest.approx(best, rel=3e-3)
            assert (outcomes.probability[row].diff() <= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_excluded_once_all_drafts_are_accepted(rule: str) -> None:
    # Two drafts of three are real; the padding repeats the token that is likeliest at k = 2.
    share = torch.full((1, 4, 40), 0.01)
    share[0, range(3), [1, 2, 0]] = 0.61
    outcomes = chosen(rule, believed(share, torch.tensor([[1, 2, 0]]), torch.tensor([2])), IDENTITY, 8)
    assert (2, 0) in pairs(outcomes, 0)
    assert max(k for k, _ in pairs(outcomes, 0)) == 2


@pytest.mark.parametrize("rule", RULES)
def test_after_a_miss_all_branches_stand_at_zero_accepted(rule: str) -> None:
    share = torch.randn(1, 5, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    beliefs = believed(share, torch.full((1, 4), -1), torch.tensor([0]))
    outcomes = chosen(rule, beliefs, Calibration().table(), 10)
    assert outcomes.accepted.tolist() == [[0] * 10]
    assert outcomes.bonus[0].tolist() == share[0, 0].topk(10).indices.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_more_branches_than_outcomes_leaves_marked_entries(rule: str) -> None:
    share = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]]])  # 2 outcomes at k = 0 and 3 at k = 1
    outcomes = chosen(rule, believed(share, torch.tensor([[1]]), torch.tensor([1])), IDENTITY, 16)
    assert set(pairs(outcomes, 0)) == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert (outcomes.bonus[0] == NO_TOKEN).sum() == 11
    torch.testing.assert_close(outcomes.probability.sum(), torch.tensor(1.0))


def test_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="none of ranked, uncalibrated, geometric, uniform"):
        chosen("best", random_beliefs(1, 1, 2, 7), IDENTITY, 4)


# --- ranked ---


@given(shape=shapes, branches=branch_counts, rule=st.sampled_from(["geometric", "uniform"]), table=tables)
@settings(max_examples=60, deadline=None)
def test_no_fixed_fan_out_covers_more_than_ranked(
    shape: dict[str, int], branches: int, rule: str, table: Tensor
) -> None:
    beliefs = random_beliefs(**shape)
    best = chosen("ranked", beliefs, table, branches).probability.sum(1)
    assert (chosen(rule, beliefs, table, branches).probability.sum(1) <= best + 1e-5).all()


@given(shapes, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_no_map_turns_the_order_within_one_accepted_length_around(shape: dict[str, int], seed: int) -> None:
    beliefs = random_beliefs(**shape)
    raw = scores(beliefs)
    outcomes = choose("ranked", beliefs, raw, taught(seed), 10**3)
    for row in range(shape["batch"]):
        for k in range(int(beliefs.n[row]) + 1):
            score = dict(zip(beliefs.tokens[row, k].tolist(), raw.token[row, k].tolist(), strict=True))
            order = [score[t] for at, t in pairs(outcomes, row) if at == k]
            assert all(a >= b or math.isclose(a, b, rel_tol=1e-4) for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("cls", range(NUM_CLASSES))
def test_the_tail_of_a_sure_distribution_keeps_its_order(cls: int) -> None:
    """A greedy map is steep: hardly a candidate but the first is likely, and still the next ones come by rank."""
    share = torch.linspace(0, -30, 64).softmax(-1).view(1, 1, 64)
    beliefs = believed(share, torch.empty(1, 0, dtype=torch.int64), torch.tensor([0]), cls=cls)
    assert chosen("ranked", beliefs, Calibration().table(), 24).bonus.tolist() == [list(range(24))]


def test_what_was_learnt_of_acceptance_moves_branches_between_lengths() -> None:
    share = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(4)).softmax(-1)
    beliefs = believed(share, share[:, :-1].argmax(-1), torch.tensor([1]))
    accepted = []
    for offset in (-6.0, 6.0):
        table = IDENTITY.clone()
        table[SAMPLED, Event.ACCEPTANCE] += offset
        accepted.append(chosen("ranked", beliefs, table, 8).accepted.sum().item())
    assert accepted == [0, 8]


def test_each_class_has_its_own_maps() -> None:
    share = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(4)).softmax(-1).expand(2, -1, -1)
    drafts, n, table = share[:, :-1].argmax(-1), torch.tensor([1, 1]), IDENTITY.clone()
    table[SAMPLED, Event.ACCEPTANCE] += 6.0
    plain_class = believed(share, drafts, n)
    mixed = Beliefs(plain_class.tokens, share, share, drafts, n, torch.tensor([SAMPLED, SAMPLED + 1]))
    outcomes = chosen("ranked", mixed, table, 8)
    assert outcomes.accepted[0].sum() == 8
    assert outcomes.accepted[1].sum() < 8


# --- allocated ---


def log_probabilities(beliefs: Beliefs) -> Tensor:
    return outcome_log_probabilities(beliefs, scores(beliefs), IDENTITY)


def test_each_row_has_its_own_fan_out() -> None:
    share = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(5)).softmax(-1)
    beliefs = believed(share, share[:, :-1].argmax(-1), torch.tensor([3, 1]))
    fan_out = torch.tensor([[1, 2, 0, 4], [5, 2, 99, 99]])  # what stands beyond n is ignored
    outcomes = allocated(beliefs.tokens, log_probabilities(beliefs), beliefs.n, fan_out, 7)
    assert outcomes.accepted.tolist() == [[0, 1, 1, 3, 3, 3, 3], [0, 0, 0, 0, 0, 1, 1]]
    top = share.topk(6).indices
    assert outcomes.bonus[0].tolist() == [top[0, 0, 1], *top[0, 1, 1:3], *top[0, 3, :4]]
    assert outcomes.bonus[1].tolist() == [*top[1, 0, 1:6], *top[1, 1, :2]]


def test_one_fan_out_for_all_rows_may_be_a_list_and_its_sum_need_not_be_n() -> None:
    share = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(5)).softmax(-1)
    beliefs = believed(share, share[:, :-1].argmax(-1), torch.tensor([2, 2]))
    value = log_probabilities(beliefs)
    for branches, expected in ((6, [0, 0, 1, 2, 2, 2]), (4, [0, 0, 1, 2]), (7, [0, 0, 1, 2, 2, 2])):
        outcomes = allocated(beliefs.tokens, value, beliefs.n, [2, 1, 3], branches)
        assert [[k for k, _ in pairs(outcomes, row)] for row in range(2)] == [expected] * 2


def test_ranked_and_allocated_agree_when_the_fan_out_is_that_of_ranked() -> None:
    share = (3 * torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(6))).softmax(-1)
    beliefs = believed(share, share[:, :-1].argmax(-1), torch.tensor([3]))
    value = log_probabilities(beliefs)
    best = ranked(beliefs.tokens, value, 12)
    fan_out = torch.bincount(best.accepted[0], minlength=4)
    assert len(fan_out.nonzero()) > 1
    fixed = allocated(beliefs.tokens, value, beliefs.n, fan_out.tolist(), 12)
    assert set(pairs(fixed, 0)) == set(pairs(best, 0))


def test_uniform_gives_each_row_the_shares_of_its_own_n() -> None:
    share = torch.randn(5, 5, 64, generator=torch.Generator().manual_seed(7)).softmax(-1)
    outcomes = chosen("uniform", believed(share, share[:, :-1].argmax(-1), torch.arange(5)), IDENTITY, 12)
    for row in range(5):
        assert torch.bincount(outcomes.accepted[row], minlength=row + 1).tolist() == uniform_fan_out(row, 12)


# --- do the predictions come true? ---


def test_ranked_hits_more_often_than_fixed_fan_outs() -> None:
    """A simulated target draws from the draft's own q, so that every score is the probability."""
    rounds, num_drafts, vocabulary, branches = 3000, 4, 64, 12
    g = torch.Generator().manual_seed(11)
    confidence = 4 * torch.rand(rounds, num_drafts + 1, 1, generator=g)  # the draft is sure here and unsure there
    logits = torch.randn(rounds, num_drafts + 1, vocabulary, generator=g) * confidence
    drafts = logits[:, :-1].argmax(-1)
    target = (logits - torch.empty_like(logits).exponential_(generator=g).log()).argmax(-1)
    k = (target[:, :-1] == drafts).long().cumprod(1).sum(1, keepdim=True)
    t = target.gather(1, k)

    beliefs = believed(logits.softmax(-1), drafts, torch.full((rounds,), num_drafts))
    hit_rate = {}
    for rule in RULES:
        outcomes = chosen(rule, beliefs, IDENTITY, branches)
        hit_rate[rule] = ((outcomes.accepted == k) & (outcomes.bonus == t)).any(1).float().mean().item()
        # three standard deviations of 3000 rounds
        assert hit_rate[rule] == pytest.approx(outcomes.probability.sum(1).mean().item(), abs=0.03)
    assert hit_rate["ranked"] == hit_rate["uncalibrated"]
    assert hit_rate["ranked"] > max(hit_rate["uniform"], hit_rate["geometric"]) + 0.02
