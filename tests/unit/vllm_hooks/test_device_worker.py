"""The order of things in a worker with runner V2, around a worker and a runner of vLLM that are not there."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_saguaro import counters
from vllm_saguaro.config import SaguaroConfig, SaguaroConfigError
from vllm_saguaro.messages import Round, Work
from vllm_saguaro.vllm_hooks import device_worker
from vllm_saguaro.vllm_hooks.device_worker import DeviceDraftWorker
from vllm_saguaro.vllm_hooks.engine_args import OPTIONS_ATTRIBUTE

Happened = list[str]


class FakeWorker:
    """vLLM's side: says what it does."""

    def __init__(self, vllm_config: Any, happened: Happened) -> None:
        self.vllm_config, self.happened = vllm_config, happened
        self.model_config = SimpleNamespace(max_model_len=32)
        self.device = torch.device("cpu")

    def init_device(self) -> None:
        self.model_runner: Any = self._make_model_runner()

    def _make_model_runner(self) -> Any:
        states = SimpleNamespace(max_num_reqs=2, vocab_size=8, device=self.device, req_id_to_index={})
        self.happened.append("runner")
        sampler = SimpleNamespace(sampling_states=SimpleNamespace(seeds=SimpleNamespace(np=np.array([3, 4]))))
        facts = {"req_states": states, "device": self.device, "max_num_reqs": 2, "sampler": sampler}
        return SimpleNamespace(speculator="vLLM's", **facts)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        self.happened.append("target")

    def determine_available_memory(self) -> int:
        self.happened.append("measured")
        self._speculator.capture()  # type: ignore[attr-defined]  # a trial: how much graphs take
        return 1 << 30

    def compile_or_warm_up_model(self) -> str:
        self.happened.append("target's graphs")
        self._speculator.capture()  # type: ignore[attr-defined]
        return "times"

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.happened.append("cache")

    def execute_model(self, scheduler_output: Any) -> str:
        self.happened.append("forward")
        return "output"

    def shutdown(self) -> None:
        self.happened.append("worker ends")


class WorkerUnderTest(DeviceDraftWorker, FakeWorker):
    """Ours before vLLM's."""


class FakeDraft:
    resident_bytes = 1 << 20
    sampling_c: float | None = None

    def __init__(self, happened: Happened) -> None:
        self.happened = happened

    def capture(self) -> None:
        self.happened.append("capture")

    def close(self) -> None:
        self.happened.append("draft ends")


def config(use_v2: bool = True, **ours_alone: Any) -> Any:
    ours = SaguaroConfig(**{"placement": "stream", "draft_max_length": 16, **ours_alone})
    options = ours.to_dict() | {"draft": {}, "target_vocab_size": 8}
    speculative = SimpleNamespace(**{OPTIONS_ATTRIBUTE: options})
    model = SimpleNamespace(use_fp64_gumbel=False)
    return SimpleNamespace(use_v2_model_runner=use_v2, speculative_config=speculative, model_config=model)


def rank(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """This is the first rank of the target, or another one."""
    group = SimpleNamespace(is_first_rank=first)
    monkeypatch.setattr(device_worker, "get_tp_group", lambda: group)
    monkeypatch.setattr(device_worker.device_ranks, "install", lambda runner, speculator, group: None)


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> Happened:
    found: Happened = []

    def open_draft(options: Any, slots: int, longest: int, device: Any, page: Any) -> FakeDraft:
        assert (slots, longest) == (2, 32)
        found.append("draft")
        return FakeDraft(found)

    monkeypatch.setattr(device_worker, "open_device_draft", open_draft)
    rank(monkeypatch, first=True)
    monkeypatch.setattr(device_worker.marked_sampler, "install", lambda *_: found.append("sampler"))
    monkeypatch.setattr(device_worker.coupled_sampler, "noise_is_known", lambda model, device: True)
    monkeypatch.setattr(device_worker.runner_v2, "install", lambda runner, ours: found.append("speculator"))
    monkeypatch.setattr(device_worker.SaguaroSpeculator, "warm_up", lambda self: found.append("warm"))
    return found


def test_from_the_start_to_the_end(happened: Happened) -> None:
    worker: Any = WorkerUnderTest(config(), happened)
    worker.init_device()
    worker.load_model()
    speculator = worker._speculator
    speculator.capture()  # vLLM's trial, while it measures memory
    worker.initialize_from_config(None)
    speculator.capture()
    speculator.begin_step = lambda output: happened.append("who leaves")
    speculator.follow_step = lambda output: happened.append("who came")
    assert worker.execute_model(None) == "output"
    assert worker._page.value(counters.DRAFT_UP) == 1
    worker.shutdown()
    worker.shutdown()
    assert happened == [
        *("runner", "speculator", "target", "sampler", "warm", "draft", "cache", "capture"),
        *("who leaves", "forward", "who came"),
        *("draft ends", "worker ends", "worker ends"),
    ]


@pytest.mark.parametrize("placement", ["stream", "process"])
def test_on_a_gpu_the_target_goes_first_where_the_draft_shares_it(
    placement: str, happened: Happened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker of CUDA over vLLM's own class, whose methods are replaced one by one."""
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_saguaro.vllm_hooks import gpu_worker

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        happened.append("(")
        yield
        happened.append(")")

    monkeypatch.setattr(gpu_worker, "captured_first", first)
    monkeypatch.setattr(gpu_worker, "set_target_stream", lambda device: happened.append("stream that goes first"))
    monkeypatch.setattr(device_worker.compatibility, "check_seams", lambda seams: happened.append("seams"))
    for name, method in vars(FakeWorker).items():
        if inspect.isfunction(method):
            assert hasattr(Worker, name), "vLLM's worker has no such method"
            monkeypatch.setattr(Worker, name, method)
    worker: Any = gpu_worker.SaguaroGPUWorker(config(placement=placement), happened)
    worker.init_device()
    worker.load_model()
    assert worker.determine_available_memory() == 1 << 30
    worker.initialize_from_config(None)
    assert worker.compile_or_warm_up_model() == "times"
    worker._speculator.begin_step = lambda output: happened.append("who leaves")
    worker._speculator.follow_step = lambda output: happened.append("who came")
    assert worker.execute_model(None) == "output"
    worker.shutdown()
    stream, begin, end = (["stream that goes first"], ["("], [")"]) if placement == "stream" else ([], [], [])
    assert happened == [
        *("seams", *stream, "runner", "speculator", "target", "sampler", "warm", "draft"),
        *(*begin, "measured", *end, "cache"),
        *(*begin, "target's graphs", "capture", *end),
        *("who leaves", "forward", "who came", "draft ends", "worker ends"),
    ]


class TellingDraft(FakeDraft):
    def rounds(self) -> list[Round]:
        return [Round(Work.ROUND, 1000, 2000, 3000, 4000, 2, 5)]


def test_a_trace_has_what_the_host_knows(happened: Happened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    monkeypatch.setattr(device_worker, "open_device_draft", lambda *_: TellingDraft(happened))
    worker: Any = WorkerUnderTest(config(trace=str(path)), happened)
    worker.init_device()
    worker.load_model()
    worker._speculator.begin_step = worker._speculator.follow_step = lambda output: None
    for hits in (0, 3):
        worker._page.add(counters.HITS, hits)
        step = SimpleNamespace(num_scheduled_tokens={"a": 5, "b": 1}, scheduled_spec_decode_tokens={"a": [1, 2]})
        assert worker.execute_model(step) == "output"
    worker.shutdown()
    told = [json.loads(line.removesuffix(",")) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    found = [(event["name"], event["pid"], event["args"]) for event in told if event["ph"] != "M"]
    steps = [("enqueue", 1, {"step": step, "rows": 2, "verifying": 1}) for step in (1, 2)]
    assert [event for event in found if event[0] == "enqueue"] == steps
    assert [event for event in found if event[0] == "draft up"] == [("draft up", 2, {})]
    outcomes = ("outcomes", 1, {"step": 2, "hits": 3, "not_predicted": 0, "absent": 0})
    assert [event for event in found if event[0] == "outcomes"] == [outcomes]
    assert ("round", 2, {"step": 1, "rows": 2, "branches": 5}) in found


@pytest.mark.parametrize(
    ("method", "known", "drawn"),
    [
        ("coupled", True, "coupled"),
        ("coupled", False, "probabilistic"),
        ("probabilistic", True, "probabilistic"),
        ("greedy", True, "greedy"),
    ],
)
def test_drafts_are_coupled_where_the_noise_is_known(
    method: str, known: bool, drawn: str, happened: Happened, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def open_draft(options: Any, *_: Any) -> FakeDraft:
        told.append(options["draft_sample_method"])
        return FakeDraft(happened)

    monkeypatch.setattr(device_worker, "open_device_draft", open_draft)
    monkeypatch.setattr(device_worker.coupled_sampler, "noise_is_known", lambda model, device: known)
    monkeypatch.setattr(device_worker.marked_sampler, "install", lambda runner, ready, coupled: told.append(coupled))
    worker: Any = WorkerUnderTest(config(draft_sample_method=method), happened)
    worker.init_device()
    worker.load_model()
    assert told == [drawn == "coupled", drawn]
    assert (worker._speculator.draft_logits is None) == (drawn != "probabilistic")
    assert (worker._speculator._seeds is not None) == (drawn == "coupled")


def test_without_a_trace_there_is_none(happened: Happened) -> None:
    worker: Any = WorkerUnderTest(config(), happened)
    worker.init_device()
    worker.load_model()
    assert worker._trace is None


def test_another_rank_than_the_first_has_no_draft_and_no_q(happened: Happened, monkeypatch: pytest.MonkeyPatch) -> None:
    rank(monkeypatch, first=False)
    worker: Any = WorkerUnderTest(config(draft_sample_method="probabilistic"), happened)
    worker.init_device()
    worker.load_model()
    assert worker._speculator.draft_logits is None
    worker.execute_model(SimpleNamespace(finished_req_ids=set(), preempted_req_ids=None, scheduled_new_reqs=[]))
    worker.shutdown()
    assert happened == ["runner", "speculator", "target", "sampler", "warm", "forward", "worker ends"]


def test_a_worker_that_ends_before_it_began(happened: Happened) -> None:
    worker: Any = WorkerUnderTest(config(), happened)
    worker.shutdown()
    assert happened == ["worker ends"]


def test_runner_v1_is_refused_before_anything_is_made(happened: Happened) -> None:
    with pytest.raises(SaguaroConfigError, match="vLLM has chosen V1 for this configuration") as caught:
        WorkerUnderTest(config(use_v2=False), happened)
    assert "\n" not in str(caught.value)
    assert not happened
