from __future__ import annotations

from pathlib import Path

import pytest

from vllm_saguaro.tuning import settings
from vllm_saguaro.tuning.settings import TuningError


@pytest.mark.parametrize(
    ("most", "asked", "quick", "batches"),
    [
        (256, False, False, (1, 4, 16)),
        (256, False, True, (1, 4)),
        (8, False, False, (1, 4)),
        (64, True, False, (1, 4, 16, 64)),
        (40, True, False, (1, 4, 16, 40)),
        (40, True, True, (1, 4)),
        (1, True, False, (1,)),
        (4, True, False, (1, 4)),
    ],
)
def test_batches_go_up_to_what_the_user_asked_for(
    most: int, asked: bool, quick: bool, batches: tuple[int, ...]
) -> None:
    assert settings.default_batches(most, asked, quick) == batches


def test_k_is_sorted_and_in_range() -> None:
    assert settings.check_ks([4, 2, 4]) == (2, 4)
    for wrong in (0, 17):
        with pytest.raises(TuningError, match=f"--k {wrong}: write numbers from 1 to 16"):
            settings.check_ks([wrong])


def test_a_load_that_the_engine_would_not_take_is_refused() -> None:
    settings.check_loads([1, 8], [0.0, 2.0], 8)
    with pytest.raises(TuningError, match="--batch 9: the engine serves 1 to 8 requests"):
        settings.check_loads([9], [0.0], 8)
    with pytest.raises(TuningError, match="--temperature -1"):
        settings.check_loads([1], [-1.0], 8)


def test_prompts_are_the_given_the_pairs_own_or_the_built_in(tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    assert settings.read_prompts(None, target) == settings.BUILT_IN
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "own"}\n\n{"prompt": "two"}\n')
    assert settings.read_prompts(None, target) == ("own", "two")
    given = tmp_path / "given.jsonl"
    given.write_text('{"prompt": "given"}\n')
    assert settings.read_prompts(given, target) == ("given",)


@pytest.mark.parametrize("text", ["plain words", "[1]", '{"text": "a"}', '{"prompt": 7}', '{"prompt": ""}', ""])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(TuningError, match=r"^--prompt-file: .*: write"):
        settings.read_prompts(path, "target")


def test_few_prompts_are_used_over_again() -> None:
    assert settings.enough(("a", "b"), 5) == ("a", "b", "a", "b", "a")


def test_prompts_leave_room_for_what_is_made() -> None:
    assert settings.room_for_prompts(2048, 64, 8) == 512
    assert settings.room_for_prompts(128, 64, 8) == 54
    for longest, tokens in ((64, 60), (2048, 4)):
        with pytest.raises(TuningError, match=f"--tokens {tokens}: write a number from 8"):
            settings.room_for_prompts(longest, tokens, 4)


def test_several_ranks_are_refused() -> None:
    settings.refuse_ranks(1)
    with pytest.raises(TuningError, match="one rank, not 2"):
        settings.refuse_ranks(2)
