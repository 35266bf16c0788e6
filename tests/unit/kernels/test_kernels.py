from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.gpu_checking.kernel_cases import MAKERS, Case, Sizes, disagreement, make_case
from tests.unit.kernels.interpreted import MODULES, ROOT, Interpreted
from vllm_saguaro.kernels.operations import TWINS

SIZES = st.builds(
    Sizes,
    slots=st.integers(1, 5),
    rows=st.integers(0, 4),
    branches=st.integers(1, 9),
    drafts=st.integers(1, 5),
    candidates=st.integers(1, 12),
    width=st.integers(1, 9),
    block_size=st.sampled_from([1, 4, 16]),
)
LARGE = {
    "settle_outcomes": Sizes(slots=5, rows=7, branches=64, drafts=16, width=40),
    "ranked_outcomes": Sizes(rows=2, branches=64, drafts=16, candidates=64),
    "fork": Sizes(slots=2, rows=2, branches=3, width=2500, block_size=16),
    "copy_blocks": Sizes(rows=1, branches=3, candidates=100, block_size=16),
    "adopt": Sizes(slots=4, rows=4, branches=64, drafts=16, width=200, block_size=1),
    "branch_step": Sizes(rows=3, branches=64, width=40, block_size=16),
    "add_noise": Sizes(rows=2, branches=3, width=50, candidates=50),
    "copy_branches": Sizes(slots=5, rows=4, branches=64, drafts=16, candidates=70),
    "copy_rows": Sizes(slots=9, rows=7, branches=2, width=700),
    "take_drafts": Sizes(slots=9, rows=7, branches=64, drafts=16),
    "seal_record": Sizes(slots=300, rows=200, drafts=16),
    "agreed": Sizes(rows=9, drafts=16),
    "gather_outcomes": Sizes(slots=300, rows=200),
    "book_drafts": Sizes(slots=30, rows=20, drafts=16),
}
"""More than one program or tile wherever a kernel has several."""
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = list(MAKERS)


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(sizes=SIZES, seed=st.integers(0, 2**32), strided=st.booleans())
def test_kernel_does_what_its_twin_does(
    name: str, interpreted: Interpreted, sizes: Sizes, seed: int, strided: bool
) -> None:
    case = make_case(name, sizes, seed, strided=strided)
    assert disagreement(case, interpreted.operation(name), getattr(TWINS, name)) == ""


@pytest.mark.parametrize("name", NAMES)
def test_kernel_does_what_its_twin_does_at_full_size(name: str, interpreted: Interpreted) -> None:
    for seed in range(3):
        case = make_case(name, LARGE[name], seed)
        assert disagreement(case, interpreted.operation(name), getattr(TWINS, name)) == ""


def test_more_branches_than_outcomes(interpreted: Interpreted) -> None:
    case = make_case("ranked_outcomes", Sizes(rows=3, branches=30, drafts=2, candidates=5), 3)
    assert disagreement(case, interpreted.operation("ranked_outcomes"), TWINS.ranked_outcomes) == ""


def test_blocks_that_are_scattered_are_refused(interpreted: Interpreted) -> None:
    pages = torch.zeros(1, 4, 6, 6, 6)[..., ::2, ::3, ::2]
    with pytest.raises(RuntimeError, match="scattered over memory"):
        interpreted.operation("copy_blocks")(pages, torch.tensor([0]), torch.tensor([1]))


PLANTED = [
    ("settle_outcomes", "+ k + 1) & (now <= max_length)", "+ k + 1)"),
    ("settle_outcomes", "(token >= 0) & (token < vocab_size)", "(token >= 0)"),
    ("settle_outcomes", "right & (k == 0) & (behind >= 0) & (behind < remembered)", "right & (k == 0) & (behind >= 0)"),
    ("settle_outcomes", "right & (k == 0) &", "right &"),
    ("settle_outcomes", "noted = kept & (is_read == 0)", "noted = kept"),
    ("settle_outcomes", "tl.store(length + slot * length_slot, now, mask=has_token)", "pass"),
    ("settle_outcomes", "& right & is_read & full", "& right & is_read"),
    ("settle_outcomes", "& right & is_read & full", "& is_read & full"),
    ("settle_outcomes", "(keys == k) & (last == token)", "(keys == k)"),
    ("settle_outcomes", "tl.where(has_token, token, 0)", "token"),
    ("ranked_outcomes", "length += stopped", "length += 0.0"),
    ("ranked_outcomes", "(other[None, :] < index[:, None])", "(other[None, :] > index[:, None])"),
    ("ranked_outcomes", "& (k < tl.load(room + row * room_row))", ""),
    ("ranked_outcomes", "tl.where(rejected, 0, BLOCK_M)", "BLOCK_M"),
    ("ranked_outcomes", "- (most + tl.log(tl.sum(tl.exp(left - most), 0)))", ""),
    ("ranked_outcomes", "mask=(j < positions - 1) & (j < n)", "mask=j < positions - 1"),
    ("ranked_outcomes", "spare = entry < tl.where(k == 0, branches, 0)", "spare = entry < 0"),
    ("fork", "tl.where(real, tl.load(lengths + row * lengths_row) + k, 0)", "tl.load(lengths + row * lengths_row) + k"),
    ("fork", "start % BLOCK_SIZE != 0", "start % BLOCK_SIZE == 0"),
    ("fork", "& (first < width)", ""),
    ("fork", "tl.minimum(tl.maximum(own, 0), owned - 1)", "tl.where(own < owned, tl.maximum(own, 0), 0)"),
    ("copy_blocks", "pages_piece\n        inside", "inner\n        inside"),
    ("copy_blocks", "* BLOCK + tl.arange(0, BLOCK)", "+ tl.arange(0, BLOCK)"),
    ("adopt", "tl.store(mine, of_text, mask=swapped)", "pass"),
    ("adopt", "(p < owned) & (entry < width)", "(p < owned - 1) & (entry < width)"),
    ("branch_step", "mask=there, other=0) + 1", "mask=there, other=0)"),
    ("branch_step", "(position < limit)", "(position <= limit)"),
    ("branch_step", "tl.minimum(position + 1, limit)", "tl.minimum(position, limit)"),
    ("add_noise", "(word << 15) | (word >> 17)", "(word << 15) | (word >> 16)"),
    ("add_noise", "h ^= 16", "h ^= 12"),
    ("add_noise", "other=0.0) / tl.load(temperature + row * temperature_row)", "other=0.0)"),
    ("add_noise", "tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
    ("add_noise", "if tl.load(noisy + row * noisy_row):", "if row >= 0:"),
    ("add_noise", "u < 0.0625, series, direct", "u < 2.0, series, direct"),
    ("take_drafts", "(sequence == tl.load(after + row * after_row)) & ", ""),
    ("take_drafts", " & (sequence & 1 == 0)", ""),
    ("take_drafts", "(count <= branches) & ", ""),
    ("take_drafts", "(depth >= 0) & ", ""),
    ("take_drafts", " & (depth <= num_drafts)", ""),
    ("take_drafts", "(generation > 0) & ", ""),
    ("take_drafts", "(of_generation == generation) & ", ""),
    ("take_drafts", " & (of_round == round_)", ""),
    ("take_drafts", "awaited & (n < count) & ", "awaited & "),
    ("take_drafts", " & (k >= 0) & (keys", " & (keys"),
    ("take_drafts", "(keys == (k << 32 | token))", "((keys & 0xFFFFFFFF) == token)"),
    ("take_drafts", "(keys == (k << 32 | token))", "(keys >> 32 == k)"),
    ("take_drafts", "tl.min(tl.where(same, n, branches), 0)", "tl.max(tl.where(same, n, -1), 0) % (branches + 1)"),
    ("take_drafts", "(branches + j * branches + first)", "(branches + j + first * num_drafts)"),
    ("take_drafts", "other=0) & 0xFFFFFFFF", "other=0)"),
    ("take_drafts", "(found >= vocab_size)", "(found > vocab_size)"),
    ("take_drafts", "given = tl.where(foreign, 0, given)", "given = given"),
    (
        "take_drafts",
        "tl.minimum(tl.maximum(tl.load(bonus + row * bonus_row), 0), vocab_size - 1)",
        "tl.load(bonus + row * bonus_row)",
    ),
    (
        "take_drafts",
        "tl.minimum(under_verification, tl.load(verified + row * verified_row).to(tl.int64))",
        "under_verification",
    ),
    ("take_drafts", "tl.store(mine + state_word, round_ + 1, mask=k >= 0)", "tl.store(mine + state_word, round_ + 1)"),
    ("take_drafts", "tl.store(mine + 2 * state_word, given, mask=k >= 0)", "tl.store(mine + 2 * state_word, given)"),
    ("copy_rows", "tl.program_id(1).to(tl.int64) * BLOCK + ", ""),
    ("copy_branches", "depth * source_depth + ", ""),
    ("copy_branches", "n * source_branch", "source_branch"),
    ("copy_branches", "(row * depths + depth) * width", "(row + depth) * width"),
    ("copy_rows", "source_row + word * source_word", "source_row + word"),
    ("copy_rows", "* source_row +", "* width +"),
    ("agreed", "(fed >= 0) & ", ""),
    ("agreed", "place + 1 < rows", "place < rows"),
    ("agreed", "begin + place + 1", "begin + place"),
    ("agreed", "there = place < rows", "there = place <= num_drafts"),
    ("agreed", "1 + tl.min(", "tl.min("),
    ("gather_outcomes", "given - 1)", "given)"),
    ("gather_outcomes", "given + left - 1", "given - 1"),
    ("gather_outcomes", "tl.where(is_certain, 0.0, ", "tl.where(is_certain, 1.0, "),
    ("gather_outcomes", "total_length + slot *", "total_length + row *"),
    (
        "book_drafts",
        "tl.where(has_token, tl.minimum(tl.load(depth + row * depth_row), allowed), 0)",
        "tl.minimum(tl.load(depth + row * depth_row), allowed)",
    ),
    ("book_drafts", "tl.minimum(tl.load(depth + row * depth_row), allowed)", "tl.load(depth + row * depth_row)"),
    ("book_drafts", "tl.maximum(found, 0)", "found"),
    ("book_drafts", "tl.minimum(tl.maximum(found, 0), last_token)", "tl.maximum(found, 0)"),
    ("book_drafts", "tl.where(has_token, kind, _NO_OUTCOME)", "kind"),
    ("book_drafts", "tl.where(allowed > 0, _NOT_PREDICTED, _ABSENT)", "tl.where(allowed > 0, _ABSENT, _NOT_PREDICTED)"),
    ("book_drafts", "tl.where(real > 0, _HIT, kind)", "kind"),
    ("seal_record", "(2 * at + 1) * _ROW_WEIGHT", "(2 * at + 3) * _ROW_WEIGHT"),
    ("seal_record", "(first + row < rows) & ", ""),
    ("seal_record", " & (word < row_words)", ""),
    ("seal_record", "total + head", "total"),
    ("seal_record", "(first + row) * row_words + word", "row * row_words + word"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED)
def test_planted_error_is_found(name: str, right: str, wrong: str, interpreted: Interpreted, tmp_path: Path) -> None:
    source = (ROOT / "vllm_saguaro" / "kernels" / f"{MODULES[name]}.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    planted = tmp_path / "planted.py"
    planted.write_text(source.replace(right, wrong), encoding="utf-8")
    sizes = [Sizes(), Sizes(branches=40, candidates=4), LARGE[name]]
    cases = (make_case(name, sizes[seed % 3], seed, strided=True) for seed in range(120))
    assert any(_differs(case, interpreted, planted) for case in cases)


def _differs(case: Case, interpreted: Interpreted, planted: Path) -> bool:
    return disagreement(case, interpreted.operation(case.operation, planted), getattr(TWINS, case.operation)) != ""


def test_sizes_of_full_cases_are_those_promised() -> None:
    assert astuple(LARGE["ranked_outcomes"])[2:5] == (64, 16, 64)
