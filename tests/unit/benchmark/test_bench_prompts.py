from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.repository import ROOT
from vllm_saguaro.benchmark.prompts import read_prompts

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["first", "and then"]},
    {"question_id": 82, "category": "qa", "turns": ["second"]},
    {"question_id": 83, "category": "writing", "turns": ["third"]},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return path


def test_the_pairs_prompts() -> None:
    assert len(read_prompts(ROOT / "assets" / "pair" / "prompts.jsonl")) == 96


def test_questions_are_asked_by_their_first_turn_in_the_files_order(questions: Path) -> None:
    assert read_prompts(questions, "spec_bench") == ["first", "second", "third"]
    assert read_prompts(questions, "spec_bench", "writing") == ["first", "third"]


@pytest.mark.slow
def test_questions_are_those_of_vllm(questions: Path) -> None:
    pytest.importorskip("pandas", reason="vLLM's own class reads with pandas")
    datasets = pytest.importorskip("vllm.benchmarks.datasets")
    theirs = datasets.SpecBench(dataset_path=str(questions), category="writing", disable_shuffle=True)
    assert [row["prompt"] for row in theirs.data] == read_prompts(questions, "spec_bench", "writing")


@pytest.mark.parametrize(
    ("text", "dataset", "category", "complaint"),
    [
        ('{"turns": ["a"]}', "prompts", None, 'line 1, has no text under "prompt".*or --dataset spec_bench'),
        ('{"prompt": "a"}\n[1]', "prompts", None, 'line 2, has no text under "prompt"'),
        ('{"prompt": "a"}', "spec_bench", None, 'has no list of texts under "turns"'),
        ('{"turns": []}', "spec_bench", None, 'has no list of texts under "turns"'),
        ("{", "prompts", None, "line 1, is no JSON"),
        ('{"prompt": "a"}', "prompts", "qa", "add --dataset spec_bench"),
        ('{"turns": ["a"], "category": "qa"}', "spec_bench", "math", "--category math: .* has qa"),
    ],
)
def test_a_file_of_another_kind_is_one_line(
    text: str, dataset: str, category: str | None, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_prompts(path, dataset, category)
