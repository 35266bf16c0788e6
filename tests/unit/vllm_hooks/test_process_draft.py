"""What the draft process of runner V2 is started with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_saguaro import counters
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.vllm_hooks import process_draft
from vllm_saguaro.vllm_hooks.process_draft import free_gpus

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CORE = min(os.sched_getaffinity(0))


def options(**changes: Any) -> dict[str, Any]:
    config = dataclasses.replace(SaguaroConfig(draft_sample_method="probabilistic"), **changes)
    draft = {"model": "draft", "max_model_len": 128}
    return {**config.to_dict(), "draft": draft, "target_vocab_size": 500, "cores": {"draft": [CORE], "target": []}}


@pytest.mark.parametrize(
    ("visible", "count", "targets", "expected"),
    [
        (None, 2, [0], "1"),
        (None, 4, [1], "0 2 3"),
        ("", 2, [0], "1"),
        ("5,7", 2, [0], "7"),
        ("GPU-a, GPU-b", 2, [1], "GPU-a"),
        (None, 8, [0, 1, 2, 3], "4 5 6 7"),
        ("5,7,1", 3, [0, 1], "1"),
    ],
)
def test_the_draft_may_have_the_gpus_that_are_not_the_targets(
    visible: str | None, count: int, targets: list[int], expected: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert free_gpus(environment, count, targets) == expected.split()


@pytest.mark.parametrize(("count", "targets"), [(0, [0]), (1, [0]), (2, [0, 1])])
def test_without_another_gpu_it_says_what_to_write(count: int, targets: list[int]) -> None:
    with pytest.raises(SaguaroConfigError, match='"placement": "stream"') as error:
        free_gpus({}, count, targets)
    assert f"beside the target's {len(targets)}, and this process sees {count}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "device", "targets"),
    [(None, "cuda", [0]), (1, "cuda:2", [2]), (2, "cuda:0", [0, 1]), (4, "cuda:1", [0, 1, 2, 3])],
)
def test_all_ranks_of_the_target_have_a_gpu(
    monkeypatch: pytest.MonkeyPatch, ranks: int | None, device: str, targets: list[int]
) -> None:
    monkeypatch.setattr(process_draft.parallel_state, "model_parallel_is_initialized", lambda: ranks is not None)
    monkeypatch.setattr(process_draft, "get_tp_group", lambda: SimpleNamespace(world_size=ranks))
    assert [*process_draft._targets(torch.device(device))] == targets


def test_the_ranks_gpus_are_those_that_vllm_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--device-ids 2,3` does."""
    monkeypatch.setattr(process_draft.parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(process_draft, "get_tp_group", lambda: SimpleNamespace(world_size=2))
    given = SimpleNamespace(logical_device_id_to_visible_device_id=lambda rank: rank + 2)
    monkeypatch.setattr(process_draft, "current_platform", given)
    assert [*process_draft._targets(torch.device("cuda", 2))] == [2, 3]


def test_the_draft_has_its_own_gpu_and_chooses_no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = SaguaroConfig.from_dict(options())
    environment = process_draft._environment(config, [CORE], CUDA)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in environment
    assert process_draft._environment(config, [CORE], CPU)["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_a_ray_of_our_own_sees_the_gpus_that_the_target_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    own, shared = SaguaroConfig(placement="ray"), SaguaroConfig(placement="ray", ray_options={"address": "auto"})
    assert process_draft._environment(own, [CORE], CUDA)["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert process_draft._environment(shared, [CORE], CUDA)["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SaguaroConfigError, match='placement "ray" needs a GPU beside the target'):
        process_draft._environment(own, [CORE], CUDA)


@pytest.mark.parametrize(("device", "own"), [(CPU, "cpu"), (CUDA, "cuda:0")])
def test_the_process_is_told_its_device_and_born_on_its_cores(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, own: str
) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def born_on(cpus: Sequence[int]) -> Iterator[None]:
        seen.append(list(cpus))
        yield
        seen.append("born")

    def refuse(module: str, told: Any, shape: MailboxShape, environment: Any) -> None:
        seen.append((module, told["model"]["device"], shape.device_steps))
        raise RuntimeError("seen")

    monkeypatch.setattr(process_draft.cores, "born_on", born_on)
    monkeypatch.setattr(process_draft, "ProcessChannel", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="seen"):
        process_draft.open_process_draft(options(), 2, device, 256, CounterPage(), lambda *_: None)  # type: ignore[arg-type]
    assert seen == [[CORE], ("vllm_saguaro.vllm_hooks.draft_process", own, process_draft.STEPS)]


def test_a_draft_pool_is_told_how_many_requests_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(draft: Any, *_: Any) -> None:
        asked.append(draft)
        raise RuntimeError("seen")

    monkeypatch.setattr(process_draft, "RayChannel", refuse)
    given = options(placement="ray", draft_pool="drafts", ray_options={"address": "10.0.0.1:6379"})
    with pytest.raises(RuntimeError, match="seen"):
        process_draft.open_process_draft(given, 12, CPU, 256, CounterPage(), lambda *_: None)  # type: ignore[arg-type]
    assert asked[0].slots == 12


def test_ray_is_asked_for_a_gpu_unless_the_user_said_how_many() -> None:
    config = SaguaroConfig(placement="ray", ray_options={"num_cpus": 2})
    assert process_draft._with_gpu(config, CUDA).ray_options == {"num_gpus": 1, "num_cpus": 2}
    asked = SaguaroConfig(placement="ray", ray_options={"num_gpus": 0.5})
    assert process_draft._with_gpu(asked, CUDA).ray_options == {"num_gpus": 0.5}
    assert process_draft._with_gpu(config, CPU) is config


def test_a_draft_that_does_not_come_up_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Channel:
        alive, shards, max_length, resident_bytes = True, (range(2),), 0, 0

        def __init__(self, *_: Any) -> None: ...

        def epoch(self, slot: int) -> int:
            return 1

        def wait_until_ready(self) -> None:
            raise RuntimeError("no model there")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(process_draft, "ProcessChannel", Channel)
    with pytest.raises(RuntimeError, match="no model there"):
        process_draft.open_process_draft(options() | {"cores": None}, 2, CPU, 256, CounterPage(), lambda *_: None)  # type: ignore[arg-type]
    assert len(closed) == 1


def test_its_hits_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    hits: list[Callable[[], float]] = []

    class Restarting:
        def __init__(self, *_: Any, **named: Any) -> None:
            hits.append(named["hits"])
            raise RuntimeError("seen")

    monkeypatch.setattr(process_draft, "RestartingChannel", Restarting)
    page = CounterPage()
    with pytest.raises(RuntimeError, match="seen"):
        process_draft.open_process_draft(options(), 2, CPU, 256, page, lambda *_: None)  # type: ignore[arg-type]
    page.add(counters.HITS, 3)
    assert hits[0]() == 3
