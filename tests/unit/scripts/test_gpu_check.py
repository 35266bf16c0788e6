from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import gpu_check
from scripts.gpu_checking import judgement, session
from scripts.gpu_checking.child import Child, ChildError
from scripts.gpu_checking.session import Session
from scripts.gpu_checking.settings import Settings, SettingsError, on_cpu
from scripts.gpu_checking.tables import failures, speed_table
from scripts.gpu_checking.texts import SURPRISE, differences, surprises
from scripts.gpu_checking.timeline import length, overlap_of, union

Json = dict[str, Any]

COUNTERS = {
    "vllm:spec_decode_num_drafts": 10,
    "vllm:spec_decode_num_accepted_tokens": 25,
    "vllm:saguaro_hits": 6,
    "vllm:saguaro_misses{cause=not_predicted}": 4,
}


# ---- a session with engines that follow a script ---------------------------------------------------------------------


class FakeChild:
    """Answers as its `plan` says, by order; "dies" ends it."""

    plans: ClassVar[dict[str, list[Any]]] = {}
    asked: ClassVar[list[str]] = []

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.name, self.alive = log.stem, True

    def __enter__(self) -> FakeChild:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, order: Json | None, seconds: float) -> Json:
        kind = "kernels" if order is None else order.get("order", "start")
        self.asked.append(f"{self.name} {kind}")
        plan = self.plans.get(f"{self.name} {kind}")
        what = plan.pop(0) if plan else None
        if what == "dies":
            self.alive = False
            raise ChildError("the process ended")
        return what or ANSWERS[kind]


ANSWERS: dict[str, Json] = {
    "kernels": {"cases": 3, "disagreements": [], "microseconds": {}},
    "start": {"start_seconds": 1.0, "kv_blocks": 9, "runner": "vllm.v1.worker.gpu.model_runner"},
    "texts": {"token_ids": [[1, 2, 3]] * 4, "gaps": [[1.0, 1.0, 1.0]] * 4},
    "speed": {"seconds": 2.0, "tokens": 100, "steps": 40, "counters": COUNTERS},
    "samples": {"token_ids": [[1, 2]] * 64},
    "no_sync": {"calls": 3, "waits": []},
    "graphs": {"captured": 6, "expected": 6},
    "memory": {"resident": 10, "weights_and_kv": 9, "grown": 0, "used": 5, "allowed": 6},
    "timeline": {"busy_ms": {"7": 3.0, "9": 1.0}, "hidden": 0.8},
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    monkeypatch.setattr(session, "Child", FakeChild)
    monkeypatch.setattr(session.provenance, "collect", lambda cores: {"date": "then"})
    FakeChild.plans, FakeChild.asked = {}, []
    return FakeChild


def run(folder: Path, **settings: Any) -> tuple[Json, list[str]]:
    lines: list[str] = []
    report = Session(Settings(batches=(1, 4), **settings), folder, lines.append).run()
    json.dumps(report)
    return report, lines


def by_name(report: Json) -> dict[str, Json]:
    return {section["name"]: section for section in report["sections"]}


def test_all_sections_are_gone_through(fakes: type[FakeChild], tmp_path: Path) -> None:
    report, lines = run(tmp_path)
    assert report["passed"]
    names = set(by_name(report))
    assert {"kernels", "saguaro: no_sync", "saguaro: graphs", "saguaro: memory", "saguaro: timeline"} <= names
    assert {f"{mode}: greedy texts are plain's" for mode in ("saguaro", "draft_model")} <= names
    for mode in ("plain", "saguaro", "draft_model"):
        assert {f"{mode}: batch {b}, T = {t}" for b in (1, 4) for t in (0, 1)} <= names
    assert all(line.startswith("ok") for line in lines)
    assert report["provenance"]["date"] == "then"


def test_an_order_that_fails_stops_no_other(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro no_sync"] = [{"error": "Traceback\n  in propose\nRuntimeError: it broke"}]
    report, lines = run(tmp_path)
    assert not report["passed"]
    failed = [section for section in report["sections"] if section["complaints"]]
    assert [section["name"] for section in failed] == ["saguaro: no_sync"]
    assert failed[0]["complaints"][0].startswith("RuntimeError: it broke")
    assert sum(line.startswith("FAILED") for line in lines) == 1
    assert "saguaro: no_sync: RuntimeError: it broke" in failures(report)


def test_an_engine_that_dies_is_started_again_for_the_rest(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro graphs"] = ["dies"]
    report, _ = run(tmp_path)
    assert fakes.asked.count("saguaro start") == 2
    assert [n for n, s in by_name(report).items() if s["complaints"]] == ["saguaro: graphs"]
    assert by_name(report)["saguaro: timeline"]["complaints"] == []


def test_an_engine_that_does_not_start_leaves_its_sections_out(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro start"] = [{"error": "ValueError: no memory"}] * 2
    report, _ = run(tmp_path)
    found = by_name(report)
    assert "left out" in found["saguaro: graphs"]["complaints"][0]
    assert found["saguaro: greedy texts are plain's"]["complaints"] == ["saguaro gave no texts"]
    assert found["draft_model: greedy texts are plain's"]["complaints"] == []


def test_kernels_that_differ_are_a_failure(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["kernels kernels"] = [{"cases": 3, "disagreements": ["fork, seed 0: ..."], "microseconds": {}}]
    report, _ = run(tmp_path)
    assert by_name(report)["kernels"]["complaints"] == ["fork, seed 0: ..."]


def test_what_has_no_time_left_fails_and_says_so(fakes: type[FakeChild], tmp_path: Path) -> None:
    report, _ = run(tmp_path, budget=1.0)
    assert not report["passed"]
    assert "budget" in by_name(report)["kernels"]["complaints"][0]


def test_texts_that_differ_are_a_failure(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro texts"] = [{"token_ids": [[1, 2, 3]] * 3 + [[1, 5, 3]], "gaps": []}]
    report, _ = run(tmp_path)
    complaint = by_name(report)["saguaro: greedy texts are plain's"]["complaints"]
    assert complaint == ["text 3, token 1: 5 for 2, which was 1.00 nats ahead"]


def test_the_table_has_a_row_for_each_cell(fakes: type[FakeChild], tmp_path: Path) -> None:
    report, _ = run(tmp_path)
    table = speed_table(report).splitlines()
    assert len(table) == 1 + 3 * 2 * 2
    assert table[0].split() == ["T", "batch", "engine", "tokens/s", "vs", "plain", *table[0].split()[6:]]
    assert "2.50" in table[2]  # accepted a round
    assert "0.60" in table[2]  # hits


# ---- judgement -------------------------------------------------------------------------------------------------------


def test_complaints_are_made_where_something_is_wrong() -> None:
    assert judgement.started({"runner": "vllm.v1.worker.gpu_model_runner"})
    assert judgement.no_sync({"calls": 0, "waits": []})
    assert "stream.py:12" in judgement.no_sync({"calls": 2, "waits": ["stream.py:12"]})[0]
    assert judgement.graphs({"captured": 0, "expected": 4})
    assert judgement.memory({"resident": 8, "weights_and_kv": 9})
    assert judgement.memory(ANSWERS["memory"] | {"grown": 1 << 30})
    assert judgement.memory(ANSWERS["memory"] | {"used": 3 << 30, "allowed": 1 << 30})
    assert judgement.timeline({"hidden": None})
    assert judgement.timeline({"hidden": 0.0})
    assert judgement.speed({"counters": {}}, "draft_model")
    assert judgement.speed({"counters": COUNTERS | {"vllm:saguaro_hits": 0}}, "saguaro")
    assert judgement.speed({"counters": COUNTERS | {"vllm:spec_decode_num_accepted_tokens": 0}}, "draft_model")


def test_a_text_may_go_another_way_only_at_a_near_tie() -> None:
    plain, gaps = [[1, 2, 3], [4, 5, 6]], [[2.0, 0.01, 2.0], [2.0, 2.0, 2.0]]
    assert differences(plain, gaps, [[1, 9, 9], [4, 5, 6]], 0.1) == (1, [])
    equal, wrong = differences(plain, gaps, [[1, 2, 3], [4, 9, 9]], 0.1)
    assert equal == 1
    assert "text 1, token 1" in wrong[0]
    assert differences(plain, gaps, [[1, 2, 3], [4, 5]], 0.1)[1]
    assert differences(plain, gaps, [[1, 2, 3]], 0.1)[1]


def draws(seed: int, weights: list[float], count: int = 1000) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.choices(range(len(weights)), weights, k=2) for _ in range(count)]


def test_samples_of_one_distribution_are_no_surprise_and_of_another_are() -> None:
    weights = [0.5, 0.2, 0.1, 0.1, 0.05, *([0.001] * 50)]
    same = [max(surprises(draws(seed, weights), draws(seed + 1000, weights))) for seed in range(30)]
    assert max(same) < SURPRISE
    assert max(surprises(draws(1, weights), draws(2, [0.4, 0.3, *weights[2:]]))) > SURPRISE
    assert surprises([[7]] * 50, [[7]] * 50) == [0.0]


def test_overlap_is_the_share_of_the_smaller_streams_that_is_covered(tmp_path: Path) -> None:
    def kernel(stream: int, begin: float, duration: float, cat: str = "kernel") -> Json:
        return {"ph": "X", "cat": cat, "ts": begin, "dur": duration, "args": {"stream": stream}}

    events = [kernel(7, 0, 100), kernel(7, 50, 60), kernel(9, 90, 40), kernel(9, 0, 999, "cpu_op")]
    trace = tmp_path / "trace.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert overlap_of(trace) == {"busy_ms": {"7": 0.11, "9": 0.04}, "hidden": 0.5}
    assert union([(3, 4), (0, 2), (1, 3)]) == [(0, 4)]
    assert length([(0, 2), (5, 6)]) == 3


# ---- options, processes ----------------------------------------------------------------------------------------------


def test_options_reach_the_engines_they_are_for() -> None:
    words = ["--pair", "32b/0.6b", "--batch", "2", "8", "--option", "branches=6", "--engine-option", "quantization=fp8"]
    settings = gpu_check.settings_from(gpu_check.parser().parse_args(words))
    orders = {mode: settings.load_order(mode, Path("t"), Path("d"))["llm"] for mode in settings.modes}
    assert "speculative_config" not in orders["plain"]
    assert orders["saguaro"]["speculative_config"]["branches"] == 6
    assert "branches" not in orders["draft_model"]["speculative_config"]
    assert {llm["quantization"] for llm in orders.values()} == {"fp8"}
    assert orders["plain"]["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8]
    assert orders["saguaro"]["compilation_config"]["cudagraph_capture_sizes"] == [5, 10, 20, 40]
    assert {llm["max_num_seqs"] for llm in orders.values()} == {8}


def test_a_cpu_is_asked_for_nothing_that_needs_a_gpu() -> None:
    settings = Settings(**on_cpu())
    asked = {order["order"] for order in settings.orders("saguaro", Path("x"))}
    assert asked == {"texts", "speed", "no_sync", "memory", "samples"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pair": "7b"}, "there is no pair '7b'"),
        ({"modes": ("saguaro",)}, "plain"),
        ({"batches": (0,)}, "at least one"),
        ({"batches": (1, 999)}, "96 prompts"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(change: Json, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        Settings(**change).check()


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(SettingsError, match="KEY=VALUE"):
        gpu_check.pair_of("branches")


def child_of(source: str, tmp_path: Path) -> Child:
    (tmp_path / "answers.py").write_text(source)
    environment = {"PYTHONPATH": str(tmp_path)}
    return Child("answers", [], environment, tmp_path / "log.txt")


def test_a_child_answers_or_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    source = (
        "import sys\nfor line in sys.stdin:\n    if 'die' in line: sys.exit('so it ended')\n    print(line, end='')"
    )
    source += "\n    sys.stdout.flush()\n"
    with child_of(source, tmp_path) as child:
        assert child.ask({"a": 1}, 60) == {"a": 1}
        with pytest.raises(ChildError, match="so it ended"):
            child.ask({"die": 1}, 60)
        assert not child.alive


def test_a_child_that_is_too_slow_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with child_of("import time\ntime.sleep(600)\n", tmp_path) as child:
        with pytest.raises(ChildError, match="no answer"):
            child.ask(None, 0.5)
        assert not child.alive


# ---- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("tests.v2") is None, reason="runner V2 on a CPU needs tests/v2")
def test_everything_that_a_cpu_can_show_is_shown(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    from tests.e2e.harness import environment_at_start

    few = ["--batch", "2", "--tokens", "8", "--texts", "2", "--samples", "8"]
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--cpu", "--output", str(tmp_path), *few],
        cwd=root,
        env=environment_at_start(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    found = by_name(report)
    assert found["saguaro: no_sync"]["answer"]["calls"] > 0
    for mode in ("saguaro", "draft_model"):
        accepted = judgement.acceptance(found[f"{mode}: batch 2, T = 0"]["answer"])
        assert accepted is not None
        assert accepted > 0
    hits = judgement.hit_rate(found["saguaro: batch 2, T = 0"]["answer"])
    assert hits is not None
    assert 0 < hits <= 1
    assert len(done.stdout) < 12_000
