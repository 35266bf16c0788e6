"""The published numbers are given back within a tenth, the worst of them included."""

from __future__ import annotations

import pytest

from vllm_saguaro.algorithm.timing import expected_tokens
from vllm_saguaro.simulation.published import (
    LLAMA_70B,
    PAPER,
    WORLDS,
    acceptance_from_tokens,
    paper_world,
)
from vllm_saguaro.simulation.validation import LIMIT, Line, as_markdown, paper_lines, reproduction_lines, summary
from vllm_saguaro.simulation.world import WorldError


def test_the_papers_table_is_predicted_from_its_ar_and_sd_columns() -> None:
    lines = list(paper_lines())
    assert len(lines) == 8
    assert [line.name for line in lines if not line.holds] == []


@pytest.mark.slow
def test_the_reproductions_are_predicted_by_engine_batch_and_k() -> None:
    lines = list(reproduction_lines())
    assert len(lines) == 3 + 5 + 4
    assert [line.name for line in lines if not line.holds] == []


def test_the_papers_world_is_fed_with_nothing_of_the_ssd_column() -> None:
    line = PAPER[0]
    world = paper_world(line)
    assert world.target_pass.at(1) == pytest.approx(1 / line.plain)
    tokens = expected_tokens([world.reach[0]] * line.sd_k)
    seconds = world.target_pass.at(line.sd_k + 1) + line.sd_k * world.draft_pass.at(1)
    assert tokens / seconds == pytest.approx(line.sd)


def test_acceptance_is_found_from_tokens() -> None:
    assert acceptance_from_tokens(expected_tokens([0.7] * 5), 5) == pytest.approx(0.7)
    with pytest.raises(WorldError):
        acceptance_from_tokens(8.0, 6)


def test_every_number_of_a_world_says_where_it_comes_from() -> None:
    for world in WORLDS.values():
        assert {"target_pass", "draft_pass", "reach", "hits", "fork", "service", "jitter"} <= set(world.source)
    assert 1 + sum(LLAMA_70B.reach[:7]) == pytest.approx(5.68, abs=0.01)
    assert 1 + sum(LLAMA_70B.backup_reach[:7]) == pytest.approx(4.01, abs=0.01)


def test_what_is_off_by_more_than_the_limit_is_shown() -> None:
    good, bad = Line("t", "good", 100.0, 105.0), Line("t", "bad", 100.0, 100 * (1 + LIMIT) + 1)
    assert good.holds
    assert not bad.holds
    text = as_markdown([good, bad])
    assert "| good | 100.0 | 105.0 | +5.0% |" in text
    assert "**+11.0%**" in text
    assert "1 of 2 within 10%" in summary([good, bad])
    assert "fed with" in as_markdown([Line("t", "x", 1.0, 1.0, "its own times")])
