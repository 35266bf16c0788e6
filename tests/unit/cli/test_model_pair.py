"""What is said of a start, from starts that are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from vllm_saguaro.cli import installation, model_pair
from vllm_saguaro.cli.finding import Level
from vllm_saguaro.config import SaguaroConfig
from vllm_saguaro.cores import CorePlan
from vllm_saguaro.vllm_hooks.dry_run import DryRun, draft_kv_bytes

GIB = 1 << 30
START = DryRun(
    config=SaguaroConfig(draft_max_length=2048),
    plan=CorePlan((0, 1, 2), (3,)),
    target="big",
    draft="small",
    target_folder=None,
    draft_folder=None,
    target_vocab=1000,
    draft_vocab=1000,
    target_tokenizer=True,
    draft_tokenizer=True,
    target_billions=8.0,
    draft_billions=1.0,
    target_length=2048,
    max_num_seqs=16,
    dtype="bfloat16",
    draft_dtype="bfloat16",
    kv_bytes_a_token=1024,
    draft_kv_bytes=GIB,
    kv_bytes=None,
    memory_share=0.4,
    slow_type=None,
    ignored=(),
)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "memory_available", lambda: (8 * GIB, 4 * GIB))


def levels(**changes: Any) -> dict[str, Level]:
    return {f.subject: f.level for f in model_pair.findings_of(dataclasses.replace(START, **changes))}


def weigh(monkeypatch: pytest.MonkeyPatch, loaded: int) -> None:
    monkeypatch.setattr(model_pair, "_loaded_bytes", lambda folder, dtype: loaded)


def test_a_pair_that_fits_has_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch, GIB)
    assert set(levels().values()) == {Level.OK}


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"draft_billions": 4.0}, "models"),
        ({"draft_tokenizer": False}, "vocabulary"),
        ({"plan": CorePlan((0,), (0,))}, "cores"),
        ({"slow_type": "slow"}, "type"),
        ({"kv_bytes_a_token": 1 << 20}, "draft kv"),
        ({"max_num_seqs": 4096}, "draft kv"),
        ({"target_length": 4096}, "lengths"),
        ({"ignored": ("--api-server-count", "2")}, "metrics"),
    ],
)
def test_what_is_not_well_is_warned_of_and_nothing_else(
    changes: dict[str, Any], subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, GIB)
    found = levels(**changes)
    assert [name for name, level in found.items() if level is not Level.OK] == [subject]
    assert found[subject] is Level.WARNING


@pytest.mark.parametrize(("loaded", "level"), [(1, Level.OK), (2, Level.WARNING), (4, Level.ERROR)])
def test_memory_counts_both_models_and_the_drafts_cache(
    loaded: int, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, loaded * GIB)
    assert levels()["memory"] is level


def test_the_share_that_vllm_takes_must_be_free_unless_its_cache_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch, GIB // 4)
    assert levels(memory_share=0.5)["memory"] is Level.OK
    (found,) = [f for f in model_pair.memory(dataclasses.replace(START, memory_share=0.9)) if f.level is Level.ERROR]
    assert "--gpu-memory-utilization 0.5" in found.advice
    assert levels(memory_share=0.9, kv_bytes=2 * GIB)["memory"] is Level.OK
    assert levels(memory_share=0.9, kv_bytes=3 * GIB)["memory"] is Level.WARNING


def test_weights_that_are_not_here_are_said_to_be_unknown_and_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert levels()["weights"] is Level.WARNING
    (tmp_path / "model.safetensors").write_text("version https://git-lfs")
    assert levels(target_folder=tmp_path)["weights"] is Level.ERROR


def test_branches_are_those_of_the_draft_side() -> None:
    assert (
        "N = 12 at first, up to 48 for one request, at most 16 each for 16 at once" in model_pair.branches(START).text
    )
    fixed = dataclasses.replace(START, config=SaguaroConfig(branches=6), max_num_seqs=1000)
    assert "N = 6 for one request, at most 1 each for 1000" in model_pair.branches(fixed).text


def test_sizes_are_for_people() -> None:
    assert [model_pair.size(n) for n in (5, 2048, 3 * GIB, 5 << 40)] == ["5 B", "2 KiB", "3 GiB", "5 TiB"]


STREAM = SaguaroConfig(placement="stream", draft_max_length=2048)


def test_on_a_gpu_its_memory_counts_and_not_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch, 10 * GIB)  # more than the machine has
    on_gpu = dataclasses.replace(START, config=STREAM, gpu_memory=80 * GIB, memory_share=0.9)
    (found,) = model_pair.memory(on_gpu)
    assert found.level is Level.OK
    assert found.text.endswith("draft KV cache 1 GiB; vLLM takes 72 GiB of the GPU's 80 GiB at most")
    (found,) = model_pair.memory(dataclasses.replace(on_gpu, gpu_memory=20 * GIB))
    assert found.level is Level.ERROR
    (found,) = model_pair.memory(dataclasses.replace(on_gpu, gpu_memory=20 * GIB, config=SaguaroConfig()))
    assert found.level is Level.OK
    assert "On another GPU: draft weights 10 GiB" in found.text


def test_branches_on_a_stream_are_those_of_its_buckets() -> None:
    on_stream = dataclasses.replace(START, config=STREAM, max_num_seqs=64)
    assert model_pair.branches(on_stream).text == "K = 4, N = 20 at most, 4 each for 64 at once"


def test_the_drafts_kv_is_what_its_placement_gives_it() -> None:
    def kv(gpu_memory: int | None, slots: int = 256, **options: Any) -> int:
        return draft_kv_bytes(SaguaroConfig(draft_max_length=2048, **options), slots, 2048, 1 << 15, gpu_memory)

    assert kv(None) == GIB
    assert kv(80 * GIB, placement="process") == 8 * GIB
    assert kv(80 * GIB, placement="stream", draft_gpu_memory=1.5) == 3 * GIB // 2
    assert kv(80 * GIB, placement="stream") == 8 * GIB
    assert 0 < kv(80 * GIB, placement="stream", slots=1) < GIB


ON_CUDA = {"gpu_memory": 80 * GIB, "plan": None}


@pytest.mark.parametrize(
    ("gpus", "ranks", "config", "level"),
    [
        (1, 1, SaguaroConfig(placement="stream"), None),
        (1, 1, SaguaroConfig(), Level.ERROR),
        (2, 1, SaguaroConfig(), None),
        (2, 2, SaguaroConfig(), Level.ERROR),
        (4, 2, SaguaroConfig(), None),
        (4, 4, SaguaroConfig(placement="ray"), Level.ERROR),
        (4, 4, SaguaroConfig(placement="ray", ray_options={"address": "auto"}), Level.WARNING),
    ],
)
def test_a_draft_on_a_gpu_of_its_own_needs_one_that_the_target_leaves(
    gpus: int, ranks: int, config: SaguaroConfig, level: Level | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, GIB)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = levels(**ON_CUDA, gpus=gpus, ranks=ranks, config=config)
    assert found.get("gpus") is level
    assert found["models"] is Level.OK
