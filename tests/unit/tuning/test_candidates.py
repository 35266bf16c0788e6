"""The choice from speeds that are planted here: the best is known."""

from __future__ import annotations

import pytest

from vllm_saguaro.tuning.candidates import (
    DRAFT_MODEL,
    MARGIN,
    PLAIN,
    SAGUARO,
    Candidate,
    Load,
    Tried,
    choice_of,
    first_of_the_best,
    gain,
    recommended,
    shortlist,
)

ONE: Load = (1, 0.0)
FOUR: Load = (4, 1.0)
PLAIN_SPEEDS = {ONE: 100.0, FOUR: 400.0}


def tried(one: float, four: float, method: str = SAGUARO, **keys: object) -> Tried:
    return Tried(Candidate(method, keys), {ONE: one, FOUR: four})


def test_the_gain_is_a_geometric_mean() -> None:
    assert gain({ONE: 200.0, FOUR: 200.0}, PLAIN_SPEEDS) == pytest.approx(1.0)
    assert gain({ONE: 400.0}, PLAIN_SPEEDS) == pytest.approx(4.0)


@pytest.mark.parametrize(("speeds", "says"), [({(9, 0.0): 1.0}, "same load"), ({ONE: 0.0}, "must be positive")])
def test_a_gain_of_nothing_is_refused(speeds: dict[Load, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gain(speeds, PLAIN_SPEEDS)


def test_the_fastest_is_chosen_and_of_near_equals_the_first() -> None:
    usual, near, fast = tried(200, 800), tried(200 * (1 + MARGIN / 2), 800, branches=8), tried(300, 900, branches=24)
    assert first_of_the_best([usual, near], PLAIN_SPEEDS) is usual
    assert first_of_the_best([usual, near, fast], PLAIN_SPEEDS) is fast
    assert first_of_the_best([usual, near], PLAIN_SPEEDS, margin=0.0) is near
    with pytest.raises(ValueError, match="nothing was tried"):
        first_of_the_best([], PLAIN_SPEEDS)


def test_the_shortlist_has_each_k_with_its_best_n() -> None:
    predicted = {
        (2, 4): {ONE: 150.0, FOUR: 600.0},
        (2, 8): {ONE: 160.0, FOUR: 600.0},
        (4, 4): {ONE: 190.0, FOUR: 700.0},
        (4, 8): {ONE: 180.0, FOUR: 700.0},
        (6, 4): {ONE: 120.0, FOUR: 300.0},
    }
    assert shortlist(predicted, PLAIN_SPEEDS, 2) == [(4, 4), (2, 8)]
    assert shortlist(predicted, PLAIN_SPEEDS, 9) == [(4, 4), (2, 8), (6, 4)]


def test_of_equals_the_shortlist_takes_the_smaller() -> None:
    same = {ONE: 150.0, FOUR: 600.0}
    assert shortlist({(4, 8): same, (2, 8): same, (2, 4): same, (4, 4): same}, PLAIN_SPEEDS, 2) == [(2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("plain", "baseline", "best"), [(100, 120, SAGUARO), (100, 500, DRAFT_MODEL), (900, 120, PLAIN)]
)
def test_what_is_faster_is_recommended(plain: float, baseline: float, best: str) -> None:
    ours = tried(150, 600)
    others = [tried(plain, 4 * plain, PLAIN), tried(baseline, 4 * baseline, DRAFT_MODEL)]
    assert recommended(ours, others, PLAIN_SPEEDS) == best


def test_a_choice_has_what_differs_from_the_users_keys_and_from_auto() -> None:
    candidate = Candidate(SAGUARO, {"num_speculative_tokens": 6, "branches": "auto", "backup": "none"})
    assert choice_of(candidate, {}) == {"num_speculative_tokens": 6, "backup": "none"}
    assert choice_of(candidate, {"backup": "jit"}) == {"num_speculative_tokens": 6}


def test_what_the_user_wrote_goes_to_saguaro_and_of_the_draft_itself_to_draft_model_too() -> None:
    fixed = {"draft_cpus": "1", "num_speculative_tokens": 3, "draft_sample_method": "coupled", "quantization": "awq"}
    keys = {"num_speculative_tokens": 6}
    assert Candidate(SAGUARO, keys).speculative_config("d", fixed) == {"method": "saguaro", "model": "d", **fixed}
    assert Candidate(DRAFT_MODEL, keys).speculative_config("d", fixed) == {
        "method": "draft_model",
        "model": "d",
        "num_speculative_tokens": 6,
        "quantization": "awq",
    }
    assert Candidate(PLAIN).speculative_config("d", fixed) is None


def test_names_are_short_and_tell_candidates_apart() -> None:
    first = Candidate(SAGUARO, {"num_speculative_tokens": 6})
    assert first.name == "saguaro K=6"
    assert first.changed(branches=8, backup="none").name == "saguaro K=6 N=8 backup=none"
    assert first.changed(sampling_c=0.5) != first.changed(sampling_c=1.0)
