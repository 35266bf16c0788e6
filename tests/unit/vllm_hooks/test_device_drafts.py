"""What the front end wrote reaches the draft on a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Callable[[], None]]]:
    """The options of each draft that is made, and what it calls when it gives up."""
    from vllm_saguaro.vllm_hooks import device_drafts

    made: list[tuple[Any, Callable[[], None]]] = []
    monkeypatch.setattr(device_drafts, "make_stream_draft", lambda *arguments: made.append(arguments))
    return made


def open_draft(page: CounterPage | None = None, **keys: Any) -> None:
    from vllm_saguaro.vllm_hooks.device_drafts import open_device_draft

    draft = {"model": "draft", "max_model_len": 300, "dtype": "float32"}
    options = {"placement": "stream", "draft": draft, "target_vocab_size": 4096, "num_speculative_tokens": 3, **keys}
    open_device_draft(options, 7, 512, torch.device("cpu"), page or CounterPage())
    assert draft["max_model_len"] == 300, "the options are the front end's"


@pytest.mark.parametrize(("gib", "expected"), [(None, 0), (0.5, 1 << 29), (2, 1 << 31)])
def test_memory_is_given_in_gib_and_taken_in_bytes(gib: float | None, expected: int, made: list[Any]) -> None:
    open_draft(draft_gpu_memory=gib)
    assert made[0][0].model.kv_cache_bytes == expected


def test_what_is_written_is_what_the_draft_is_made_with(made: list[Any]) -> None:
    open_draft(branches=24, draft_sample_method="probabilistic", sampling_c=0.5)
    (options, _), *_ = made
    assert (options.slots, options.num_speculative_tokens, options.branches) == (7, 3, 24)
    assert (options.method, options.sampling_c) == ("probabilistic", 0.5)
    assert (options.model.max_rows, options.model.max_length, options.model.vocab_size) == (7, 300, 4096)
    assert (options.model.model, options.model.device) == ("draft", "cpu")


def test_what_chooses_itself_is_left_to_the_draft(made: list[Any]) -> None:
    open_draft()
    assert (made[0][0].branches, made[0][0].sampling_c) == (None, 1.0)


def test_a_draft_that_gives_up_is_counted_as_left_off(made: list[Any]) -> None:
    page = CounterPage()
    open_draft(page)
    page.set(counters.DRAFT_UP, 1)
    made[0][1]()
    assert (page.value(counters.DRAFT_UP), page.value(counters.DRAFT_LEFT_OFF)) == (0, 1)
