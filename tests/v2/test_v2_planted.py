"""Samples with real drafts are the target's; a stale table on a stream, and a wrong q of either placement, are seen.

The process has no stale table here: tokens that the q beside them could not have given count as certain
(`device_q.py`), and are verified exactly.
"""

from __future__ import annotations

import pytest

from tests.e2e.harness import Json
from tests.v2 import v2_plans
from tests.v2.drawn_samples import samples_p
from tests.v2.v2_runs import OPTIONS, V2Run, run_v2, saguaro

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.long]

CHANCE = 1e-3
"""How unlikely samples must be to be wrong."""
SAMPLES = 48
TOLD_SAMPLES = 240
STALE_SAMPLES = 96
"""A stale draft is mostly none of the likely tokens, and is rejected: only what is drawn instead is wrong."""


def run(placement: str, *planted: Json) -> V2Run:
    """One engine: samples as they are, and with each error in turn. With K = 1 most outcomes are among the branches."""
    ours = saguaro(placement=placement, num_speculative_tokens=1, branches=16, draft_sample_method="probabilistic")
    plan: Json = {"options": OPTIONS | {"max_num_seqs": 16} | ours, "scripted": False, "async": True}
    (found,) = run_v2([plan | {"scenarios": [v2_plans.drawn("samples", SAMPLES), *planted]}])
    return found


@pytest.fixture(scope="module")
def stream() -> V2Run:
    stale = v2_plans.drawn("stale", STALE_SAMPLES, plant="stream: stale")
    return run("stream", stale, v2_plans.drawn("told sharper", TOLD_SAMPLES, plant="stream: told sharper"))


@pytest.fixture(scope="module")
def process() -> V2Run:
    return run("process", v2_plans.drawn("told sharper", TOLD_SAMPLES, plant="process: told sharper"))


def assert_right(found: V2Run) -> None:
    assert samples_p(found["samples"]) > CHANCE
    assert found["samples"].accepted > SAMPLES / 2
    assert found["samples"].metrics["vllm:saguaro_misses{cause=not_predicted}"] > 0


def test_samples_with_a_draft_process_are_the_targets(process: V2Run) -> None:
    assert_right(process)


def test_a_wrong_q_of_a_draft_process_is_seen(process: V2Run) -> None:
    assert samples_p(process["told sharper"]) < CHANCE


def test_samples_with_a_draft_on_a_stream_are_the_targets(stream: V2Run) -> None:
    assert_right(stream)


def test_a_stale_table_of_a_draft_on_a_stream_is_seen(stream: V2Run) -> None:
    assert samples_p(stream["stale"]) < CHANCE


def test_a_wrong_q_of_a_draft_on_a_stream_is_seen(stream: V2Run) -> None:
    assert samples_p(stream["told sharper"]) < CHANCE
