from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.gpu_checking.kernel_cases import MAKERS, Case, Sizes, disagreement, make_case
from tests.unit.algorithm import device_loops
from vllm_saguaro.algorithm import (
    agreement,
    branch_step,
    branch_tables,
    outcome_ranking,
    outcome_settling,
    step_outcomes,
    step_records,
)
from vllm_saguaro.algorithm.outcomes import Beliefs, outcome_log_probabilities, ranked, scores
from vllm_saguaro.kernels.operations import TWINS

SIZES = st.builds(
    Sizes,
    slots=st.integers(1, 5),
    rows=st.integers(0, 5),
    branches=st.integers(1, 9),
    drafts=st.integers(1, 5),
    candidates=st.integers(1, 9),
    width=st.integers(1, 9),
    block_size=st.sampled_from([1, 3, 4, 16]),
)
MANY = settings(max_examples=60, deadline=None)
IN_PLACE = ("settle_outcomes", "copy_blocks", "adopt", "branch_step", "take_drafts", "seal_record", "book_drafts")


@MANY
@given(sizes=SIZES, seed=st.integers(0, 2**32), strided=st.booleans())
def test_ranking_does_what_the_loop_does(sizes: Sizes, seed: int, strided: bool) -> None:
    assert _ranking_is_wrong(make_case("ranked_outcomes", sizes, seed, strided=strided), TWINS.ranked_outcomes) == ""


@MANY
@given(sizes=SIZES, seed=st.integers(0, 2**32), strided=st.booleans())
def test_fork_does_what_the_loop_does(sizes: Sizes, seed: int, strided: bool) -> None:
    case = make_case("fork", sizes, seed, strided=strided)
    got = TWINS.fork(*case.arguments)
    tables, source, destination = (t.tolist() for t in got)
    assert (tables, source, destination) == device_loops.fork(*case.arguments)
    assert {t.dtype for t in got} == {torch.int32}


@pytest.mark.parametrize("name", ["agreed", "gather_outcomes", "copy_rows", "copy_branches"])
@MANY
@given(sizes=SIZES, seed=st.integers(0, 2**32), strided=st.booleans())
def test_what_is_given_is_what_the_loop_gives(name: str, sizes: Sizes, seed: int, strided: bool) -> None:
    assert not _is_wrong(make_case(name, sizes, seed, strided=strided), getattr(TWINS, name))


@pytest.mark.parametrize("name", IN_PLACE)
@MANY
@given(sizes=SIZES, seed=st.integers(0, 2**32), strided=st.booleans())
def test_what_changes_in_place_is_what_the_loop_changes(name: str, sizes: Sizes, seed: int, strided: bool) -> None:
    case = make_case(name, sizes, seed, strided=strided)
    assert disagreement(case, getattr(TWINS, name), getattr(device_loops, name)) == ""


def test_the_ranking_is_that_of_outcomes_without_calibration() -> None:
    """The same beliefs through `algorithm.outcomes`, with maps that change nothing that can be told apart."""
    from tests.unit.algorithm.test_outcomes import IDENTITY, random_beliefs

    beliefs = random_beliefs(5, 40, 4, 12, padding=0.25)
    plain = Beliefs(beliefs.tokens, beliefs.share, beliefs.share, beliefs.drafts, beliefs.n, beliefs.classes)
    raw = scores(plain)
    expected = ranked(plain.tokens, outcome_log_probabilities(plain, raw, IDENTITY), 8)
    room = torch.full((40,), 9, dtype=torch.int32)
    n = plain.n.to(torch.int32)
    got = TWINS.ranked_outcomes(plain.tokens, plain.share.log(), plain.drafts, n, raw.accept, 8, room)
    clear = expected.probability[:, :1] > 1.5 * expected.probability[:, 1:2]  # the map is a line between its nodes
    assert int(clear.sum()) > 10
    first = clear.squeeze(1)
    assert torch.equal(got[0][first, 0].to(torch.int64), expected.accepted[first, 0])
    assert torch.equal(got[1][first, 0], expected.bonus[first, 0])


def test_all_outcomes_together_are_certain() -> None:
    arguments = make_case("ranked_outcomes", Sizes(rows=30, branches=4 * 8, drafts=3, candidates=8), 2).copied()
    arguments[1].copy_(torch.rand(arguments[1].shape).add(0.1).log())  # nothing impossible
    arguments[6].fill_(4)
    log_p = TWINS.ranked_outcomes(*arguments)[2]
    assert torch.allclose(log_p.exp().sum(1), torch.ones(30), atol=1e-5)


def test_a_failed_draft_model_has_no_outcomes() -> None:
    arguments = make_case("ranked_outcomes", Sizes(), 1).copied()
    arguments[1].fill_(torch.nan)
    accepted, bonus, log_p = TWINS.ranked_outcomes(*arguments)
    assert torch.equal(accepted, torch.full_like(accepted, -1))
    assert torch.equal(bonus, torch.zeros_like(bonus))
    assert torch.equal(log_p, torch.full_like(log_p, -torch.inf))


def test_swapping_twice_changes_nothing() -> None:
    main, private, slots, branch, first = make_case("adopt", Sizes(rows=4), 4).copied()
    before = main.clone(), private.clone()
    TWINS.adopt(main, private, slots, branch, first)
    assert not torch.equal(main, before[0])
    TWINS.adopt(main, private, slots, branch, first)
    assert torch.equal(main, before[0])
    assert torch.equal(private, before[1])


PLANTED = [
    (outcome_settling, "settle_outcomes", "& (lengths <= max_length)", ""),
    (outcome_settling, "settle_outcomes", "(agrees | ~token)", "agrees"),
    (outcome_settling, "settle_outcomes", "(accepted == 0) & ", ""),
    (outcome_settling, "settle_outcomes", "& (behind < tail.shape[1])", ""),
    (outcome_settling, "settle_outcomes", "torch.where(token, lengths, length[slots])", "lengths"),
    (outcome_settling, "settle_outcomes", "active & (count == num_drafts)", "active & (count > 0)"),
    (outcome_settling, "settle_outcomes", "token & right & read[slots]", "token & read[slots]"),
    (outcome_ranking, "ranked_outcomes", "& (k < room.unsqueeze(1))", ""),
    (outcome_ranking, "ranked_outcomes", "& (k[:-1] < n).unsqueeze(-1)", ""),
    (outcome_ranking, "ranked_outcomes", "- left.logsumexp(-1, keepdim=True)", ""),
    (outcome_ranking, "ranked_outcomes", ".cumsum(1)", ""),
    (outcome_ranking, "ranked_outcomes", "log_p.sort(", "(log_p + 1e-6 * torch.arange(log_p.shape[1])).sort("),
    (branch_tables, "fork", "own < 0", "own <= 0"),
    (branch_tables, "fork", "& (first < width)", ""),
    (branch_tables, "fork", "torch.where(real, ", "torch.where(real | True, "),
    (branch_tables, "copy_blocks", "torch.where(real, source, source[again])", "source"),
    (branch_tables, "adopt", "(entry < width) & ", ""),
    (branch_tables, "adopt", "torch.where(branch >= 0, first, 0)", "first"),
    (branch_step, "branch_step", "positions < limit", "positions <= limit"),
    (branch_step, "branch_step", ".clamp_max(limit)", ""),
    (step_records, "take_drafts", "(before == after) & ", ""),
    (step_records, "take_drafts", " & (before & 1 == 0)", ""),
    (step_records, "take_drafts", "(count <= branches) & ", ""),
    (step_records, "take_drafts", "& (depth >= 0)", ""),
    (step_records, "take_drafts", " & (depth <= num_drafts)", ""),
    (step_records, "take_drafts", "(generation > 0) & ", ""),
    (step_records, "take_drafts", "(of_generation == generation) & ", ""),
    (step_records, "take_drafts", " & (of_round == round_)", ""),
    (step_records, "take_drafts", "torch.where(there, body[:, :branches] >> 32, -1)", "(body[:, :branches] >> 32)"),
    (step_records, "take_drafts", "tokens = body & _TOKEN", "tokens = body"),
    (
        step_records,
        "take_drafts",
        ".unflatten(1, (num_drafts, branches)).transpose(1, 2)",
        ".unflatten(1, (branches, num_drafts))",
    ),
    (step_records, "take_drafts", "(drafts >= vocab_size)", "(drafts > vocab_size)"),
    (step_records, "take_drafts", "count = torch.where(foreign, 0, count)", "pass"),
    (step_records, "take_drafts", "bonus.clamp(0, vocab_size - 1)", "bonus"),
    (step_records, "take_drafts", "torch.minimum(under_verification, verified)", "under_verification"),
    (step_records, "take_drafts", "torch.where(has_outcome, count, under_verification)", "count"),
    (step_records, "take_drafts", "round_ + has_outcome", "round_ + 1"),
    (step_records, "seal_record", "2 * torch.arange", "torch.arange"),
    (step_records, "copy_branches", "source[cells, :, branch]", "source[cells, :, 0]"),
    (step_records, "copy_rows", "source.index_select(0, rows)", "source[: len(rows)]"),
    (agreement, "agreed", " & (fed[:, 1:] >= 0)", ""),
    (agreement, "agreed", ".cumprod(1, dtype=torch.int32)", ""),
    (agreement, "agreed", "1 + same", "0 + same"),
    (step_outcomes, "gather_outcomes", "num_sampled.to(torch.int32) - 1", "num_sampled.to(torch.int32)"),
    (step_outcomes, "gather_outcomes", "(num_sampled + num_rejected)", "(num_sampled)"),
    (step_outcomes, "gather_outcomes", ".masked_fill(certain[where], 0.0)", ""),
    (step_outcomes, "book_drafts", ".masked_fill(accepted < 0, 0)", ""),
    (step_outcomes, "book_drafts", "torch.minimum(depth, allowed)", "depth.clone()"),
    (step_outcomes, "book_drafts", "torch.clamp(drafts, 0, last_token, out=tokens)", "tokens.copy_(drafts)"),
    (step_outcomes, "book_drafts", "torch.where(accepted < 0, NO_OUTCOME, kind)", "kind"),
    (step_outcomes, "book_drafts", "torch.where(real > 0, HIT, kind)", "kind"),
    (step_records, "seal_record", "rows * row_words", "rows"),
    (step_records, "seal_record", ".sum(), head", ".sum(), 0"),
]


@pytest.mark.parametrize(("module", "name", "right", "wrong"), PLANTED)
def test_planted_error_is_found(module: ModuleType, name: str, right: str, wrong: str) -> None:
    source = inspect.getsource(module)
    assert source.count(right) >= 1
    room: dict[str, Any] = {"__name__": "planted"}
    exec(source.replace(right, wrong), room)
    cases = (make_case(name, Sizes(rows=7, width=3), seed, strided=seed % 2 == 0) for seed in range(60))
    assert any(_is_wrong(case, room[name]) for case in cases)


def _is_wrong(case: Case, operation: Callable[..., Any]) -> bool:
    try:
        if case.operation == "ranked_outcomes":
            return _ranking_is_wrong(case, operation) != ""
        if case.operation in IN_PLACE:
            return disagreement(case, operation, getattr(device_loops, case.operation)) != ""
        got = operation(*case.arguments)
        got = (got,) if isinstance(got, Tensor) else got
        return tuple(t.tolist() for t in got) != getattr(device_loops, case.operation)(*case.arguments)
    except (RuntimeError, IndexError):
        return True


def _ranking_is_wrong(case: Case, operation: Callable[..., Any]) -> str:
    """What differs from the loop, where one k is concerned exactly, else to the last digits; "" if nothing."""
    candidates, log_q, drafts, n, accept, branches, room = case.arguments
    got = operation(*case.arguments)
    if [t.dtype for t in got] != [torch.int32, torch.int64, torch.float32]:
        return "types"
    for b, order in enumerate(device_loops.outcomes_in_order(candidates, log_q, drafts, n, accept, room)):
        rows = list(zip(*(t[b].tolist() for t in got), strict=True))
        if rows[len(order) :] != [(-1, 0, -torch.inf)] * max(branches - len(order), 0):
            return f"row {b} ends in {rows[len(order) :]}"
        mine, yours = rows[: len(order)], order[:branches]
        if any(abs(one[2] - other[2]) > 1e-4 for one, other in zip(mine, yours, strict=True)):
            return f"row {b}: {mine} for {yours}"
        for k in range(candidates.shape[1]):
            of_k = [t for j, t, _ in mine if j == k]
            if of_k != [t for j, t, _ in order if j == k][: len(of_k)]:
                return f"row {b}, k = {k}: {mine} for {yours}"
    return ""


def test_every_operation_has_cases() -> None:
    assert set(MAKERS) == set(TWINS.__dataclass_fields__)
