"""The actor around a draft pool, without Ray."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest

from tests.unit.placement.pooled import Engine, ask, make_pool, model
from vllm_saguaro.placement import ray_pool
from vllm_saguaro.placement.pool import DraftPool
from vllm_saguaro.placement.ray_pool import PoolActor


class EndedError(Exception):
    """Instead of the end of this process."""


def asked() -> dict[str, Any]:
    given = ask("b")
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}


def actor_of(pool: DraftPool) -> PoolActor:
    """One whose draft has loaded. (Its constructor asks Ray where it is.)"""
    actor = PoolActor.__new__(PoolActor)
    actor._start, actor._pool, actor._trouble = {"ask": asked()}, pool, ""
    actor._loaded = threading.Event()
    actor._loaded.set()
    return actor


@pytest.mark.parametrize("hangs", [False, True])
def test_a_full_pool_that_hangs_is_ended_by_who_finds_no_room(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its engines have let go of it and come again; it can give back no place."""

    def end(status: int) -> None:
        raise EndedError

    monkeypatch.setattr(ray_pool.os, "_exit", end)
    pool = make_pool(model(), engines=1)
    Engine(pool)
    actor = actor_of(pool)
    if hangs:
        pool._beat = time.monotonic() - ray_pool._HANGS_SECONDS - 1
        with pytest.raises(EndedError):
            actor.draft_for(asked(), {})
    else:
        pool.turn()
        answer = actor.draft_for(asked(), {})
        assert answer == {"refused": "the pool has room for 1 engines (draft_pool_engines), which are all there",
                          "disagrees": False}  # fmt: skip
