from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from vllm_saguaro.benchmark.records import Engine, Repetition, Report, Run, Workload

PLAIN = Engine("plain")
DRAFT_3 = Engine("draft_model", 3)
DRAFT_4 = Engine("draft_model", 4)
SAGUARO = Engine("saguaro", 4, 12, "ranked")
GREEDY = Workload(1, 0.0)


def make_repetition(
    speed: float,
    rounds: int = 100,
    tokens: int = 100,
    drafting: float = 0.0,
    counters: dict[str, float] | None = None,
    same_text: int | None = 2,
) -> Repetition:
    seconds = tokens / speed
    return Repetition(
        wall_seconds=seconds + 0.1,
        decode_seconds=seconds,
        tokens=tokens + 2,
        decode_tokens=tokens,
        rounds=rounds,
        steps=rounds,
        drafting_seconds=drafting * seconds,
        counters=counters or {},
        digests=["aa", "bb"],
        same_text=same_text,
    )


def saguaro_counters(rounds: int = 40, hits: int = 30) -> dict[str, float]:
    misses = rounds - hits
    return {
        "vllm:spec_decode_num_drafts": hits,
        "vllm:spec_decode_num_accepted_tokens": 2 * hits,
        "vllm:spec_decode_num_accepted_tokens_per_pos[0]": hits,
        "vllm:spec_decode_num_accepted_tokens_per_pos[1]": hits,
        "vllm:spec_decode_num_accepted_tokens_per_pos[2]": 0,
        "vllm:spec_decode_num_accepted_tokens_per_pos[3]": 0,
        "vllm:saguaro_hits": hits,
        "vllm:saguaro_misses{cause=not_predicted}": misses - 2,
        "vllm:saguaro_misses{cause=absent}": 2,
        "vllm:saguaro_late_tables": 1,
        "vllm:saguaro_draft_round_seconds.count": rounds,
        "vllm:saguaro_draft_round_seconds.sum": rounds * 0.008,
        "vllm:saguaro_verify_seconds.count": rounds,
        "vllm:saguaro_verify_seconds.sum": rounds * 0.010,
        "vllm:saguaro_target_wait_seconds.count": rounds,
        "vllm:saguaro_target_wait_seconds.sum": rounds * 0.00002,
    }


def make_report(speed_up: float = 1.0) -> Report:
    """Plain 100 tokens/s, draft_model 150 and 200, saguaro 300; the second repetition runs at half the speed."""
    runs = []
    for engine, speed in ((PLAIN, 100.0), (DRAFT_3, 150.0), (DRAFT_4, 200.0), (SAGUARO, 300.0)):
        rounds = 100 if engine == PLAIN else 40
        drafting = 3 / 7 if engine.mode == "draft_model" else 0.0
        counters = saguaro_counters(rounds) if engine == SAGUARO else {}
        runs.append(
            Run(
                engine,
                GREEDY,
                [
                    make_repetition(speed * speed_up * factor, rounds, drafting=drafting, counters=counters)
                    for factor in (1.0, 0.5)
                ],
            )
        )
    settings = {
        "target": "assets/pair/target",
        "draft": "assets/pair/target/draft",
        "target_layers": 24,
        "draft_layers": None,
        "dtype": "float32",
        "eager": False,
        "prompts": 2,
        "tokens": 51,
        "repetitions": 2,
    }
    provenance = {
        "git": {"revision": "0123456789abcdef", "dirty": True},
        "versions": {"vllm": "0.32.0+cpu"},
        "processor": {"model": "Some Processor", "flags": ["avx2"]},
        "cores_used": [0, 1],
    }
    return Report(provenance, settings, {engine.name: {} for engine in (PLAIN, DRAFT_3, DRAFT_4, SAGUARO)}, runs)


def test_engine_names_say_what_the_engine_is() -> None:
    assert [engine.name for engine in (PLAIN, DRAFT_4, SAGUARO)] == [
        "plain",
        "draft_model K=4",
        "saguaro K=4 N=12 ranked",
    ]


def test_swept_options_and_top_p_are_in_the_names() -> None:
    swept = Engine("saguaro", 4, 12, "ranked", "coupled", (("sampling_c", 0.5), ("adaptive", True), ("backup", "jit")))
    assert swept.name == "saguaro K=4 N=12 ranked sampling_c=0.5 adaptive=true backup=jit"
    assert Workload(2, 1.0, 0.9).name == "batch 2, T=1, top-p=0.9"
    assert Workload(2, 1.0).name == "batch 2, T=1"


def test_swept_engines_and_forecasts_survive_writing_and_reading(tmp_path: Path) -> None:
    report = make_report()
    engine = dataclasses.replace(SAGUARO, options=(("sampling_c", 0.5), ("backup", "jit")))
    repetition = make_repetition(10.0)
    repetition.forecasts = {"outcomes": 3, "hits@1": 2, "error_bonus": 0.25}
    report.runs.append(Run(engine, Workload(1, 1.0, 0.9), [repetition]))
    path = tmp_path / "report.json"
    report.write(path)
    read = Report.read(path)
    assert read == report
    assert {run.engine: run for run in read.runs}[engine].workload.top_p == 0.9


def test_reports_from_before_there_were_sweeps_can_be_read() -> None:
    data = make_report().to_json()
    for run in data["runs"]:
        del run["engine"]["options"], run["workload"]["top_p"]
        for repetition in run["repetitions"]:
            del repetition["forecasts"]
    assert Report.from_json(data) == make_report()


def test_a_curve_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"schema": 1, "kind": "curve", "points": [], "reports": []}))
    with pytest.raises(ValueError, match="no runs of its own"):
        Report.read(path)


def test_a_report_survives_writing_and_reading(tmp_path: Path) -> None:
    report = make_report()
    path = tmp_path / "new folder" / "report.json"
    report.write(path)
    assert Report.read(path) == report


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="format 0"):
        Report.read(path)


def test_speed_is_of_the_decode_part_where_there_is_one() -> None:
    repetition = make_repetition(speed=50.0)
    assert repetition.tokens_per_second == pytest.approx(50.0)
    repetition.decode_tokens = 0
    assert repetition.tokens_per_second == pytest.approx(102 / repetition.wall_seconds)
