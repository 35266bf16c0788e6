"""q as logits: softmax(row / T) is what the drafts were drawn from, or the drafts are certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_saguaro.messages import Proposals
from vllm_saguaro.placement.device_q import LogitsWriter, is_sound
from vllm_saguaro.placement.distribution import is_distribution

SLOTS, K, VOCAB, M = 5, 3, 50, 6
CPU = torch.device("cpu")


def drawn(seed: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """drafts [B, K], and candidates [B, K, M] that they may have been drawn from; the last one or two are unused."""
    random = np.random.default_rng(seed)
    tokens = np.stack([random.permutation(VOCAB)[:M] for _ in range(rows * K)]).reshape(rows, K, M)
    weights = random.random((rows, K, M)).astype(np.float32) + np.float32(0.01)
    weights[..., M - 1 - int(random.integers(2)) :] = 0
    tokens[..., M - 1] = random.integers(0, 2**31, (rows, K)) if seed % 2 else tokens[..., 0]
    q = weights / weights.sum(-1, keepdims=True)
    chosen = random.integers(0, M - 2, (rows, K, 1))
    drafts = np.take_along_axis(tokens, chosen, -1)[..., 0]
    return torch.from_numpy(drafts), torch.from_numpy(tokens), torch.from_numpy(q)


def writer() -> LogitsWriter:
    return LogitsWriter(SLOTS, K, M, CPU)


def logits_of(
    drafts: Tensor, tokens: Tensor, q: Tensor, temperature: list[float], told: bool = True
) -> tuple[Tensor, Tensor]:
    """What was written, by row, and what became of the other slots."""
    logits = torch.full((SLOTS, K, VOCAB), 7.0)
    slots = torch.tensor([3, 1][: len(drafts)])
    every = torch.full(drafts.shape, told)
    writer().write(logits, slots, slots.numpy(), drafts, torch.tensor(temperature), tokens, q, every)
    others = torch.ones(SLOTS, dtype=torch.bool)
    others[slots] = False
    return logits[slots], logits[others]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(2**-7, 128, width=32), min_size=2, max_size=2))
def test_the_verifier_finds_the_q_that_was_drawn_from(seed: int, temperature: list[float]) -> None:
    drafts, tokens, q = drawn(seed, 2)
    rows, others = logits_of(drafts, tokens, q, temperature)
    expected = torch.zeros(2, K, VOCAB)
    used = q > 0
    expected.scatter_add_(2, torch.where(used, tokens, 0), torch.where(used, q, 0.0))
    found = (rows / torch.tensor(temperature)[:, None, None]).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)
    assert torch.equal(rows.isfinite(), expected > 0)
    assert (others == 7).all()


def certain(rows: Tensor, drafts: Tensor) -> bool:
    return torch.equal((rows / 0.7).softmax(-1), torch.nn.functional.one_hot(drafts, VOCAB).float())


def spoilt(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A q that is none, at the second draft of the first row."""
    drafts, tokens, q = drawn(2, 2)
    at = (0, 1)
    if name == "sum":
        q[at] *= 1.001
    elif name == "negative":
        q[at][0], q[at][1] = -0.1, q[at][1] + q[at][0] + 0.1
    elif name == "nan":
        q[at][0] = torch.nan
    elif name == "infinite":
        q[at][0] = torch.inf
    elif name == "twice":
        tokens[at][0] = tokens[at][1]
        drafts[at] = tokens[at][1]
    elif name == "beyond":
        tokens[at][0] = VOCAB
    elif name == "below":
        tokens[at][0] = -1
    elif name == "not of this draft":
        drafts[at] = next(token for token in range(VOCAB) if token not in tokens[at])
    elif name == "of probability 0":
        q[at][1] += q[at][0]
        q[at][0] = 0
        drafts[at] = tokens[at][0]
    return drafts, tokens, q


@pytest.mark.parametrize(
    "name",
    ["sum", "negative", "nan", "infinite", "twice", "beyond", "below", "not of this draft", "of probability 0"],
)
def test_a_q_that_is_none_makes_that_draft_certain_and_no_other(name: str) -> None:
    drafts, tokens, q = spoilt(name)
    rows, _ = logits_of(drafts, tokens, q, [0.7, 0.7])
    assert certain(rows[0, 1], drafts[0, 1])
    others = torch.ones(2, K, dtype=torch.bool)
    others[0, 1] = False
    assert (rows[others].isfinite().sum(-1) >= 4).all()


def test_drafts_whose_q_is_not_there_are_certain() -> None:
    drafts, tokens, q = drawn(1, 2)
    rows, others = logits_of(drafts, tokens, q, [0.7, 0.7], told=False)
    assert certain(rows, drafts)
    assert (others == 7).all()


def test_each_draft_is_told_apart() -> None:
    drafts, tokens, q = drawn(1, 1)
    logits, slots = torch.zeros(SLOTS, K, VOCAB), torch.tensor([4])
    told = torch.tensor([[True, True, False]])
    writer().write(logits, slots, slots.numpy(), drafts, torch.tensor([0.7]), tokens, q, told)
    assert [certain(logits[4, depth], drafts[0, depth]) for depth in range(K)] == [False, False, True]


def test_greedy_rows_are_certain() -> None:
    drafts, tokens, q = drawn(1, 2)
    rows, _ = logits_of(drafts, tokens, q, [0.0, 0.7])
    assert certain(rows[0], drafts[0])
    assert not certain(rows[1], drafts[1])
    assert not rows.isnan().any()


def test_certain_rows_are_written_where_they_belong() -> None:
    logits = torch.zeros(SLOTS, K, VOCAB)
    drafts, slots = torch.tensor([[1, 2, 3], [4, 4, 49]]), torch.tensor([2, 0])
    writer().write_certain(logits, slots, slots.numpy(), drafts)
    assert certain(logits[[2, 0]], drafts)
    assert (logits[[1, 3, 4]] == 0).all()


# ---- one round after the other ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A round: which slots, from which random numbers, and what makes some of their drafts certain."""

    slots: list[int]
    seed: int
    certain: bool
    temperature: float
    told: bool
    spoilt: bool

    def write(self, by: LogitsWriter, logits: Tensor) -> None:
        slots, rows = torch.tensor(self.slots), len(self.slots)
        drafts, tokens, q = drawn(self.seed, rows)
        if self.certain:
            by.write_certain(logits, slots, slots.numpy(), drafts)
            return
        if self.spoilt:
            q[0, 1] *= 1.01
        told = torch.full((rows, K), self.told)
        told[-1, K - 1] = False
        temperature = torch.full((rows,), self.temperature)
        by.write(logits, slots, slots.numpy(), drafts, temperature, tokens, q, told)


ROUNDS = st.builds(
    Written,
    slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True),
    seed=st.integers(0, 10**6),
    certain=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    told=st.booleans(),
    spoilt=st.booleans(),
)


def as_if_filled(rounds: Sequence[Written], logits: Tensor) -> Tensor:
    """What the rounds leave where each fills the whole rows of its slots."""
    expected = logits.clone()
    for each in rounds:
        filled = torch.zeros(SLOTS, K, VOCAB)
        each.write(writer(), filled)  # one that has written nothing yet
        expected[each.slots] = filled[each.slots]
    return expected


@settings(max_examples=100, deadline=None)
@given(st.lists(ROUNDS, min_size=1, max_size=8), st.integers(0, 7))
def test_what_was_written_is_taken_back_and_rows_are_as_if_filled(rounds: list[Written], moved: int) -> None:
    """Whatever was written before; also where the rows are another tensor's from some round on."""
    first, second = torch.full((SLOTS, K, VOCAB), 7.0), torch.full((SLOTS, K, VOCAB), 5.0)
    one = writer()
    for number, each in enumerate(rounds):
        each.write(one, first if number < moved else second)
    assert torch.equal(first, as_if_filled(rounds[:moved], torch.full_like(first, 7.0)))
    assert torch.equal(second, as_if_filled(rounds[moved:], torch.full_like(second, 5.0)))


def test_rows_are_filled_once() -> None:
    """What else was written into a row stays there: nothing but its own is taken back."""
    logits, one = torch.zeros(SLOTS, K, VOCAB), writer()
    slots = torch.tensor([2])
    one.write_certain(logits, slots, slots.numpy(), torch.tensor([[1, 2, 3]]))
    logits[2, 0, 40] = 9.0
    one.write_certain(logits, slots, slots.numpy(), torch.tensor([[4, 5, 6]]))
    assert logits[2, 0].isfinite().nonzero().flatten().tolist() == [4, 40]


def test_a_writer_that_takes_nothing_back_is_seen() -> None:
    rounds = [Written([1, 3], seed, False, 0.7, True, False) for seed in (1, 2)]
    logits, one = torch.zeros(SLOTS, K, VOCAB), writer()
    for each in rounds:
        one._written.zero_()
        each.write(one, logits)
    assert not torch.equal(logits, as_if_filled(rounds, torch.zeros(SLOTS, K, VOCAB)))


# ---- exactness -------------------------------------------------------------------------------------------------------


def exactly_the_target(rows: Tensor, temperature: float, drafts: Tensor, drawn_from: Tensor) -> bool:
    """Whether the first draft, drawn from `drawn_from`, leads to the target's own p under V2's rule with these rows.

    P(y) = sum_x d(x) [min(1, p(x) / q(x)) [y = x] + (1 - min(1, p(x) / q(x))) r(y)], r = max(p - q, 0) normalised.
    """
    p = torch.linspace(0.1, 3, VOCAB).softmax(-1).double()
    total = torch.zeros(VOCAB, dtype=torch.double)
    for x in range(VOCAB):
        if not drawn_from[x]:
            continue
        q = (rows(x) / temperature).softmax(-1).double() if callable(rows) else (rows / temperature).softmax(-1)
        accept = min(1.0, float(p[x] / q[x])) if q[x] else 1.0
        rest = (p - q).clamp_min(0)
        total[x] += drawn_from[x] * accept
        if accept < 1:
            total += drawn_from[x] * (1 - accept) * rest / rest.sum()
    return bool(torch.allclose(total, p, atol=1e-6))


@pytest.mark.parametrize("told", [True, False])
def test_told_or_not_the_output_is_the_targets(told: bool) -> None:
    _, tokens, q = drawn(4, 1)
    d = torch.zeros(VOCAB, dtype=torch.double)
    used = q[0, 0] > 0
    d[tokens[0, 0][used]] = q[0, 0][used].double()

    def rows(x: int) -> Tensor:
        drafts = torch.full((1, K), x)
        return logits_of(drafts, tokens, q, [0.7], told)[0][0, 0]

    assert exactly_the_target(rows, 0.7, torch.tensor([0]), d)  # type: ignore[arg-type]


def test_a_lie_about_q_is_seen_by_that_check() -> None:
    _, tokens, q = drawn(4, 1)
    d = torch.zeros(VOCAB, dtype=torch.double)
    d[tokens[0, 0][0]] = 1.0

    def rows(x: int) -> Tensor:
        return logits_of(torch.full((1, K), x), tokens, q, [0.7])[0][0, 0]

    assert not exactly_the_target(rows, 0.7, torch.tensor([0]), d)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-2, 12) | st.integers(-(2**31), 2**31 - 1),
            st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.25, float("nan"), float("inf"), 0.2500001, 1e-30]),
        ),
        min_size=4,
        max_size=4,
    )
)
def test_a_distribution_is_what_the_host_takes_for_one(entries: list[tuple[int, float]]) -> None:
    tokens = np.array([[token for token, _ in entries]], np.int32)
    probabilities = np.array([[p for _, p in entries]], np.float32)
    host = is_distribution(Proposals(tokens, probabilities), 10)
    device = is_sound(torch.from_numpy(tokens).long(), torch.from_numpy(probabilities), 10)
    assert device.tolist() == [host]
