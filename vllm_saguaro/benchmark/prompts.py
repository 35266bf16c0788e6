"""Files of prompts: our own lines of {"prompt": ...}, and Spec-Bench's question files as vLLM's benchmarks read them.

vLLM has a class for the latter (`vllm.benchmarks.datasets.SpecBench`). It is not used: importing it takes as long as
starting an engine and needs pandas, and a client of servers has no other use for vLLM. What counts is taken over from
it: the first turn of each question, the category as a filter. The order is that of the file (vLLM's
`--disable-shuffle`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATASETS = ("prompts", "spec_bench")


def read_prompts(path: Path, dataset: str = "prompts", category: str | None = None) -> list[str]:
    """All prompts of a file, of one category where one is named (`spec_bench` alone has them).

    Raises ValueError with one line for a file that is not of this kind, or a category that is not in it, and OSError.
    """
    if category is not None and dataset != "spec_bench":
        raise ValueError("--category is one of spec_bench's: add --dataset spec_bench, or leave it out")
    if dataset == "prompts":
        return [_prompt(path, number, line) for number, line in _lines(path)]
    questions = [_question(path, number, line) for number, line in _lines(path)]
    chosen = [text for text, kind in questions if category in (None, kind)]
    if not chosen and questions:
        known = ", ".join(dict.fromkeys(kind for _, kind in questions))
        raise ValueError(f"--category {category}: {path} has {known}")
    return chosen


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is no JSON ({error.msg}): write one object a line") from None


def _prompt(path: Path, number: int, line: Any) -> str:
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        advice = ", or --dataset spec_bench" if isinstance(line, dict) and "turns" in line else ""
        raise ValueError(f'{path}, line {number}, has no text under "prompt": write {{"prompt": "..."}}{advice}')
    return str(line["prompt"])


def _question(path: Path, number: int, line: Any) -> tuple[str, str]:
    turns = line.get("turns") if isinstance(line, dict) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise ValueError(
            f'{path}, line {number}, has no list of texts under "turns": is it a question.jsonl of Spec-Bench? '
            '(for lines of {"prompt": ...} leave --dataset spec_bench out)'
        )
    return turns[0], str(line.get("category", ""))
