"""What a draft side is started with, and the mailbox to it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.drafting.loop import MAX_ROWS_A_TREE
from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig
from vllm_saguaro.vllm_hooks.draft_options import KV_BYTES, draft_options, mailbox_shape

OPTIONS: dict[str, Any] = {"draft": {"model": "draft", "max_model_len": 128}, "target_vocab_size": 500}


def told(slots: int = 2, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    return draft_options(SaguaroConfig(**changes), OPTIONS, slots, (3, 5), device)


def test_it_is_json_that_the_draft_model_takes() -> None:
    found = json.loads(json.dumps(told(branches=7, num_speculative_tokens=3)))
    model = DraftModelConfig(**found["model"])
    assert (model.model, model.max_length, model.vocab_size, model.device) == ("draft", 128, 500, "cpu")
    assert (found["branches"], found["choose_branches"], found["num_speculative_tokens"]) == (7, False, 3)
    assert found["cpus"] == [3, 5]
    assert "max_model_len" in OPTIONS["draft"]  # what the front end wrote is left as it was


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda:0", "cuda")])
def test_the_budget_is_the_devices(device: str, kind: str) -> None:
    found = told(device=device)["model"]
    assert (found["device"], found["kv_cache_bytes"]) == (device, KV_BYTES[kind])


def test_there_are_rows_for_a_tree_and_for_every_request() -> None:
    assert told(slots=2)["model"]["max_rows"] == MAX_ROWS_A_TREE
    assert told(slots=MAX_ROWS_A_TREE + 44)["model"]["max_rows"] == MAX_ROWS_A_TREE + 44


def test_a_pool_has_room_for_all_its_engines() -> None:
    alone = told(slots=300)["model"]
    many = told(slots=300, placement="ray", draft_pool="drafts", draft_pool_engines=3)["model"]
    assert (alone["max_rows"], many["max_rows"]) == (300, 900)
    assert many["kv_cache_bytes"] == 3 * alone["kv_cache_bytes"]


def test_a_prompt_of_the_greatest_length_fits_into_the_ring() -> None:
    config = dataclasses.replace(SaguaroConfig(), branches=5, num_speculative_tokens=3)
    shape = mailbox_shape(config, OPTIONS, 4, 1 << 20)
    assert shape.ring_bytes > 8 * (1 << 20)
    assert (shape.slots, shape.branches, shape.num_speculative_tokens, shape.vocab_size) == (4, 5, 3, 500)
    assert (shape.device_steps, mailbox_shape(config, OPTIONS, 4, 8, device_steps=9).device_steps) == (0, 9)
