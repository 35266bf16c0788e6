from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from vllm_saguaro.benchmark import client, deepened, procfs, provenance, session
from vllm_saguaro.benchmark.client import WorkerError, WorkerHandle
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.benchmark.settings import Settings


class FakeWorker:
    """Answers at once; all workers write what is asked of them into one diary."""

    diary: ClassVar[list[str]] = []
    different: ClassVar[str] = ""
    hits: ClassVar[int] = 1

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.awake = False
        self.loaded = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.awake = True
        yield
        self.awake = False

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.awake
        if not self.loaded:
            self.loaded = True
            self.diary.append(f"load {self.name}")
            return {"start_seconds": 1.0}
        if order["tokens"] < 96:
            return {}
        self.diary.append(self.name)
        last = 1 if self.name == self.different else 0
        return {
            "wall_seconds": 1.0,
            "decode_seconds": 0.5,
            "tokens": 192,
            "decode_tokens": 190,
            "rounds": 100,
            "steps": 100,
            "drafting_seconds": 0.1,
            "counters": {"vllm:saguaro_hits": self.hits},
            "token_ids": [[1, 2], [3, last]],
        }

    def cpu_seconds(self) -> float:
        return 0.0

    def begin_close(self) -> None:
        self.diary.append(f"end {self.name}")

    def close(self) -> None:
        pass


class Steps(Progress):
    def __init__(self) -> None:
        self.expected = self.seen = 0

    def begin(self, steps: int) -> None:
        self.expected = steps

    def step(self, doing: str) -> None:
        self.seen += 1


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(session, "WorkerHandle", FakeWorker)
    monkeypatch.setattr(session, "_idle_share", lambda worker: 0.0)
    monkeypatch.setattr(provenance, "busy_share", lambda cores: 0.0)
    monkeypatch.setattr(procfs, "busy_seconds", lambda cores: 0.0)
    monkeypatch.setattr(session, "_memory_warnings", lambda engines: [])
    monkeypatch.setattr(session, "_core_warnings", lambda settings: [])
    monkeypatch.setattr(FakeWorker, "diary", [])
    monkeypatch.setattr(FakeWorker, "different", "")
    target = tmp_path / "target"
    (target / "draft").mkdir(parents=True)
    for folder in (target, target / "draft"):
        (folder / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return Settings(target=target, prompts=2, repetitions=2)


def test_engines_take_turns_and_are_loaded_once(settings: Settings) -> None:
    progress = Steps()
    report = session.measure(settings, progress)
    names = [engine.name for engine in settings.engines()]
    assert FakeWorker.diary == [
        *(f"load {name}" for name in names),
        *names,
        *names,
        *(f"end {name}" for name in names),
    ]
    assert progress.seen == progress.expected
    assert [len(run.repetitions) for run in report.runs] == [2, 2, 2]
    assert report.notes == []
    assert set(report.summaries) == {run.name for run in report.runs}
    json.dumps(report.to_json())


def test_texts_are_compared_with_those_of_plain(settings: Settings) -> None:
    FakeWorker.different = "saguaro K=4 N=auto ranked"
    report = session.measure(settings)
    assert [run.repetitions[0].same_text for run in report.runs] == [2, 2, 1]
    assert report.runs[0].repetitions[0].digests == report.runs[1].repetitions[0].digests


def test_sampled_texts_are_not_compared(settings: Settings) -> None:
    report = session.measure(Settings(**{**vars(settings), "temperature": (1.0,)}))
    assert [run.repetitions[0].same_text for run in report.runs] == [None, None, None]


def test_interference_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_idle_share", lambda worker: 1.0 if "saguaro" in worker.name else 0.0)
    monkeypatch.setattr(procfs, "busy_seconds", lambda cores: 1000 * time.perf_counter())
    heard: list[str] = []
    report = session.measure(settings, warn=heard.append)
    assert len(report.notes) == 2
    assert report.notes == heard
    assert report.notes[0].startswith("other processes took up to")
    assert report.notes[1] == "saguaro K=4 N=auto ranked took 100% of a core with nothing to do"


def test_a_draft_side_that_does_nothing_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "hits", 0)
    (note,) = session.measure(settings).notes
    assert note.startswith("saguaro K=4 N=auto ranked, batch 1, T=0: no table was ever there")


def test_workers_end_when_something_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeWorker, order: dict[str, Any]) -> dict[str, Any]:
        raise WorkerError("no memory")

    monkeypatch.setattr(FakeWorker, "ask", fail)
    with pytest.raises(WorkerError, match="no memory"):
        session.measure(settings)
    assert FakeWorker.diary == ["end plain"]


def test_a_real_worker_reports_what_went_wrong_and_ends(tmp_path: Path) -> None:
    worker = WorkerHandle("broken", tmp_path / "log")
    try:
        with worker.turn(), pytest.raises(WorkerError, match=r"broken: Traceback[\s\S]*KeyError"):
            worker.ask({})
    finally:
        worker.close()
    assert worker.process.returncode is not None


def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "hanging_worker.py").write_text("import time\ntime.sleep(600)\n")
    worker = WorkerHandle("hanging", tmp_path / "log", "hanging_worker")
    with pytest.raises(WorkerError, match=r"hanging: no answer after 0\.005 minutes, so it was ended"):
        worker.ask({})
    worker.close()
    assert worker.process.returncode == -signal.SIGKILL


def test_a_frozen_worker_ends_when_it_is_told(tmp_path: Path) -> None:
    worker = WorkerHandle("idle", tmp_path / "log")
    with worker.turn():
        pass
    assert worker.process.poll() is None
    worker.close()
    assert worker.process.returncode == 0


def test_processor_time_of_a_session() -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    with subprocess.Popen(
        [sys.executable, "-c", f"{burn}\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert procfs.session_seconds(process.pid) >= 0.25
        process.communicate(b"\n")
    assert procfs.session_seconds(process.pid) == 0


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), session._terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_deepened_copy_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"num_hidden_layers": 2}')
    made: list[int] = []

    def fake_deepen(source: Path, destination: Path, layers: int) -> None:
        made.append(layers)
        (destination / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))

    monkeypatch.setattr("vllm_saguaro.benchmark.deepen.deepen", fake_deepen)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert deepened.deepened(source, None) == source
    first = deepened.deepened(source, 6)
    assert deepened.deepened(source, 6) == first
    assert made == [6]
    (source / "config.json").write_text('{"num_hidden_layers":    2}')
    assert deepened.deepened(source, 6) != first
