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
from scripts.gpu_checking.cells import acceptance, hit_rate, speeds
from scripts.gpu_checking.child import Child, ChildError
from scripts.gpu_checking.session import Session
from scripts.gpu_checking.settings import GOAL_PAIR, MODES, PROCESS, Settings, SettingsError, on_cpu
from scripts.gpu_checking.tables import failures, goal_table, speed_table
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
        assert order is None or not {"pair", "mode", "warm_up"} & set(order), "an engine has no use for those"
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
    "no_sync": {"calls": 3, "waits": [], "outside": [], "of_vllm": ["async_utils.py:7"]},
    "hit": {"batch": 1, "rounds": 9, "late": 0, "us": 41.0, "look_up_us": 30.0, "q_us": 11.0, "most_us": 44.0},
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


def run(folder: Path, **changes: Any) -> tuple[Json, list[str]]:
    """With engines that are all as fast as each other, so without the pair that the goals are about."""
    lines: list[str] = []
    settings: Json = {"batches": (1, 4), "also": (), **changes}
    report = Session(Settings(**settings), folder, lines.append).run()
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
    assert {"saguaro: hit at batch 1", "saguaro: hit at batch 4", "goals"} <= names
    for mode in ("plain", "saguaro", "draft_model"):
        assert {f"{mode}: batch {b}, T = {t}" for b in (1, 4) for t in (0, 1)} <= names
    assert not any("process" in name for name in names)
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
    assert table[0].split()[:9] == ["pair", "T", "batch", "engine", "tokens/s", "vs", "plain", "vs", "draft_model"]
    assert "2.50" in table[2]  # accepted a round
    assert "0.60" in table[2]  # hits


def spoken(seconds: float) -> Json:
    return ANSWERS["speed"] | {"seconds": seconds}


def test_the_table_says_how_many_times_as_fast_as_both_others(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans = {"plain speed": [spoken(6.0)] * 9, "draft_model speed": [spoken(3.0)] * 9}
    report, _ = run(tmp_path, temperatures=(0.0,))
    rows = [line.split() for line in speed_table(report).splitlines()[1:]]
    assert [row[3:7] for row in rows[:3]] == [
        ["plain", "17", "1.00", "0.50"],
        ["saguaro", "50", "3.00", "1.50"],
        ["draft_model", "33", "2.00", "1.00"],
    ]


# ---- a second GPU, a second pair -------------------------------------------------------------------------------------


def test_the_process_placement_is_an_engine_of_its_own(fakes: type[FakeChild], tmp_path: Path) -> None:
    report, _ = run(tmp_path, gpus=2, modes=MODES)
    assert report["passed"]
    names = set(by_name(report))
    assert {f"{PROCESS}: {what}" for what in ("no_sync", "hit at batch 4", "samples are plain's")} <= names
    assert f"{PROCESS}: greedy texts are plain's" in names
    assert not {f"{PROCESS}: {what}" for what in ("graphs", "memory", "timeline")} & names
    assert sum(PROCESS in line for line in speed_table(report).splitlines()) == 4
    assert "second GPU" not in goal_table(report)
    fakes.plans[f"{PROCESS} no_sync"] = [{"calls": 3, "waits": ["x.py:1"], "outside": [], "of_vllm": []}]
    assert not run(tmp_path, gpus=2, modes=MODES)[0]["passed"]


def test_of_another_pair_only_the_speed_is_measured(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["32b-0.6b-plain speed"] = [spoken(8.0)] * 9
    fakes.plans["32b-0.6b-draft_model speed"] = [spoken(3.0)] * 9
    report, _ = run(tmp_path, also=(GOAL_PAIR,), batches=(1, 16, 64), gpus=2, modes=MODES)
    assert report["passed"]
    asked = [each.split() for each in fakes.asked if each.startswith("32b-0.6b")]
    assert {name for name, _ in asked} == {"32b-0.6b-plain", "32b-0.6b-saguaro", "32b-0.6b-draft_model"}
    assert {kind for _, kind in asked} == {"start", "speed", "hit"}
    cells = {cell for cell in speeds(report["sections"]) if cell[0] == GOAL_PAIR}
    modes = ("plain", "saguaro", "draft_model")
    assert cells == {(GOAL_PAIR, mode, batch, t) for mode in modes for batch in (1, 64) for t in (0.0, 1.0)}
    assert not list(tmp_path.glob("*/target"))


def test_another_pair_is_left_out_where_it_may_not_end_in_time(
    fakes: type[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_needed", lambda self, pair: 1e6)
    report, _ = run(tmp_path, also=(GOAL_PAIR,))
    (failed,) = [section for section in report["sections"] if section["complaints"]]
    assert failed["name"] == f"{GOAL_PAIR}: models"
    assert failed["complaints"][0].startswith("left out: it may need 1000000 s")
    assert not any("32b" in name for name in fakes.asked)
    assert "not measured" in goal_table(report)


def test_what_another_pair_may_need_follows_from_the_first(fakes: type[FakeChild], tmp_path: Path) -> None:
    check = Session(Settings(batches=(1, 4)), tmp_path, lambda _: None)

    def took(seconds: float, mode: str, **of: Any) -> session.Section:
        return session.Section("x", seconds=seconds, of={"pair": "8b/1b", "mode": mode, **of})

    between = check._needed(GOAL_PAIR)
    check.sections += [took(30.0, "plain", order="start"), took(99.0, PROCESS, order="start")]
    assert check._needed(GOAL_PAIR) == between + 36.0
    check.sections += [took(2.0, "plain", order="speed", batch=4), took(99.0, "plain", order="texts")]
    assert 36.0 + 2 * 3.5 < check._needed(GOAL_PAIR) - between < 36.0 + 2 * 4.5


# ---- goals -----------------------------------------------------------------------------------------------------------


def of_goals(report: Json) -> dict[str, Json]:
    return {each["goal"]: each for each in report["goals"]}


def test_goals_that_are_met_and_missed(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["plain speed"] = [spoken(5.2)] * 9
    fakes.plans["draft_model speed"] = [spoken(2.2)] * 9
    report, _ = run(tmp_path, pair=GOAL_PAIR, batches=(1, 64), temperatures=(0.0,))
    found = of_goals(report)
    assert found[f"{GOAL_PAIR}, batch 1, T = 0: saguaro / plain"]["met"] is True
    missed = f"{GOAL_PAIR}, batch 1, T = 0: saguaro / draft_model"
    assert found[missed] == {"goal": missed, "wanted": ">= 1.15", "found": 1.1, "met": False}
    assert found[f"{GOAL_PAIR}, batch 64, T = 0: saguaro / draft_model"]["met"] is True
    assert by_name(report)["goals"]["complaints"] == [f"{missed}: 1.1, not >= 1.15"]
    assert "MISSED" in goal_table(report)
    assert not report["passed"]


def test_slower_at_the_large_batch_is_missed_whatever_the_pair(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro speed"] = [spoken(2.1)] * 99
    report, _ = run(tmp_path, batches=(1, 64))
    missed = [each["goal"] for each in report["goals"] if each["met"] is False]
    assert missed == [f"8b/1b, batch 64, T = {t}: saguaro / {o}" for t in (0, 1) for o in ("draft_model", "plain")]
    assert not any("batch 1," in goal and "saguaro /" in goal for goal in of_goals(report))


def test_a_hit_that_costs_too_much_is_missed(fakes: type[FakeChild], tmp_path: Path) -> None:
    fakes.plans["saguaro hit"] = [ANSWERS["hit"], ANSWERS["hit"] | {"batch": 4, "us": 60.0}]
    report, _ = run(tmp_path)
    found = [of_goals(report)[f"8b/1b, batch {batch}: GPU time of a hit [us]"]["met"] for batch in (1, 4)]
    assert found == [True, False]


def test_what_was_not_measured_is_not_judged(fakes: type[FakeChild], tmp_path: Path) -> None:
    report, _ = run(tmp_path, pair=GOAL_PAIR, modes=("plain", "saguaro"))
    goal = of_goals(report)[f"{GOAL_PAIR}, batch 1, T = 0: saguaro / draft_model"]
    assert (goal["found"], goal["met"]) == (None, None)
    assert of_goals(report)[f"{GOAL_PAIR}, batch 64, T = 0: saguaro / plain"]["met"] is None
    assert "not measured" in goal_table(report)
    assert "needs a second GPU, and 1 is visible" in goal_table(report)


def test_a_cpus_times_are_not_judged(fakes: type[FakeChild], tmp_path: Path) -> None:
    report = Session(Settings(**on_cpu()), tmp_path, lambda _: None).run()
    assert report["passed"]
    assert any(each["found"] is not None for each in report["goals"])
    assert {each["met"] for each in report["goals"]} == {None}
    assert "a CPU's times" in goal_table(report)


# ---- judgement -------------------------------------------------------------------------------------------------------


def test_complaints_are_made_where_something_is_wrong() -> None:
    assert judgement.started({"runner": "vllm.v1.worker.gpu_model_runner"})
    nowhere: Json = {"calls": 2, "waits": [], "outside": [], "of_vllm": ["runner.py:1"]}
    assert not judgement.no_sync(nowhere)
    assert judgement.no_sync(nowhere | {"calls": 0})
    assert "stream.py:12" in judgement.no_sync(nowhere | {"waits": ["stream.py:12"]})[0]
    assert "outside of propose at worker.py:3" in judgement.no_sync(nowhere | {"outside": ["worker.py:3"]})[0]
    assert "of 7 the device had begun" in judgement.hit({"rounds": 0, "late": 7})[0]
    assert not judgement.hit(ANSWERS["hit"])
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
    assert orders["saguaro"]["speculative_config"]["draft_gpu_memory"] == 3.0
    beside = settings.load_order(PROCESS, Path("t"), Path("d"))["llm"]["speculative_config"]
    assert (beside["method"], beside["placement"], beside["branches"]) == ("saguaro", "process", 6)
    assert "draft_gpu_memory" not in beside


def settings_of(*words: str) -> Settings:
    return gpu_check.settings_from(gpu_check.parser().parse_args(list(words)))


def test_a_second_gpu_brings_the_process_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, has_it in ((1, False), (2, True)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        settings = settings_of()
        assert (PROCESS in settings.modes, settings.gpus) == (has_it, gpus)
        assert PROCESS in settings_of("--cpu").modes
    assert settings_of("--engines", "plain", "saguaro").modes == ("plain", "saguaro")


def test_the_pair_of_the_goals_comes_after_any_other() -> None:
    assert settings_of().also == (GOAL_PAIR,)
    assert settings_of("--pair", GOAL_PAIR).also == ()
    assert settings_of("--also").also == ()
    assert settings_of("--cpu").also == ("deeper",)
    settings_of("--cpu").check()


def test_a_speed_is_taken_from_some_whole_batches() -> None:
    orders = Settings(batches=(1, 3, 64)).orders("plain", Path("x"))
    counts = {o["batch"]: o["prompts"] for o in orders if o["order"] == "speed" and not o.get("warm_up")}
    assert counts == {1: 4, 3: 6, 64: 64}


def test_a_cpu_is_asked_for_nothing_that_needs_a_gpu() -> None:
    settings = Settings(**on_cpu())
    asked = {order["order"] for order in settings.orders("saguaro", Path("x"))}
    assert asked == {"texts", "speed", "no_sync", "hit", "memory", "samples"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pair": "7b"}, "there is no pair '7b'"),
        ({"also": ("7b",)}, "there is no pair '7b'"),
        ({"also": ("8b/1b",)}, "measured twice"),
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
    for mode in ("saguaro", PROCESS):
        assert found[f"{mode}: no_sync"]["answer"]["calls"] > 0
        assert found[f"{mode}: hit at batch 2"]["answer"]["us"] > 0
        hits = hit_rate(found[f"{mode}: batch 2, T = 0"]["answer"])
        assert hits is not None
        assert 0 < hits <= 1
    for mode in MODES[1:]:
        accepted = acceptance(found[f"{mode}: batch 2, T = 0"]["answer"])
        assert accepted is not None
        assert accepted > 0
    assert ("deeper", "saguaro", 2, 1.0) in speeds(report["sections"])
    assert len(done.stdout) < 12_000
