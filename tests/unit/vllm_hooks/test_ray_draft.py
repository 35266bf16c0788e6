"""What Ray is asked for, from what the user wrote."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.vllm_hooks.ray_draft import check_cluster, ray_draft

PLAN = {"draft": [3], "target": [0, 1, 2]}


def pooled(**ray_options: Any) -> SaguaroConfig:
    return SaguaroConfig(placement="ray", draft_pool="drafts", draft_pool_engines=7, ray_options=ray_options or None)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_pool_is_asked_for_in_the_cluster_that_is_named() -> None:
    draft = ray_draft(pooled(address="10.0.0.1:6379", namespace="ours"), {"branches": 4}, PLAN, {}, slots=12)
    assert (draft.pool, draft.engines, draft.slots) == ("drafts", 7, 12)
    assert (draft.address, draft.namespace, draft.num_cpus) == ("10.0.0.1:6379", "ours", 1)


def test_without_a_pool_none_is_asked_for() -> None:
    assert ray_draft(SaguaroConfig(placement="ray"), {}, PLAN, {}).pool is None


@pytest.mark.parametrize(("number", "again", "expected"), [(0, False, True), (1, False, False), (1, True, True)])
def test_of_several_drafts_that_wait_for_room_at_the_start_one_tells(number: int, again: bool, expected: bool) -> None:
    draft = ray_draft(SaguaroConfig(placement="ray"), {}, PLAN, {}, again=again, number=number)
    assert draft.tells_that_it_waits is expected


def test_a_pool_without_a_cluster_is_refused_in_one_line() -> None:
    with pytest.raises(SaguaroConfigError, match='draft_pool "drafts" is for the engines of one Ray cluster') as found:
        check_cluster(pooled())
    assert "\n" not in str(found.value)
    assert check_cluster(SaguaroConfig(placement="ray")) is None


def test_the_cluster_of_the_environment_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check_cluster(pooled()) == "10.0.0.1:6379"


@pytest.mark.parametrize(("again", "expected"), [(False, [0, 1, 2, 3]), (True, [3])])
def test_a_ray_of_our_own_starts_beside_the_draft_while_the_target_decodes(again: bool, expected: list[int]) -> None:
    assert ray_draft(SaguaroConfig(placement="ray"), {}, PLAN, {}, again=again).daemon_cpus == expected
