"""The committed pair tuned in earnest, and an engine that starts with the file: plain vLLM's greedy text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import BASE, ENVIRONMENT, ROOT, TARGET, assert_same_texts, is_gone_within, run_engines
from tests.e2e.plans import greedy
from vllm_saguaro import tuned

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8")
WORDS = (*OPTIONS, "--kv-cache-memory-bytes", str(192 << 20))
SHORT = ("--batch", "1", "--temperature", "0", "--k", "2", "4", "--tokens", "24", "--quick", "--minutes", "0.1")
GREEDY = greedy(4, "greedy", 4)


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`vllm-saguaro tune` of the committed pair, with its output in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_saguaro.cli", "tune", str(TARGET), *SHORT, *words, "--", *WORDS],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )


def below(pid: int) -> list[int]:
    """All processes below one that is alive."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *below(child))]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file, and what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    process = command(folder, "--json")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    return folder / "saguaro-tuned.json", json.loads(out)


@pytest.mark.long  # eight engines, one after the other
def test_the_file_has_what_was_measured(answer: tuple[Path, dict[str, Any]]) -> None:
    path, printed = answer
    assert json.loads(path.read_text()) == printed
    methods = {each["method"] for each in printed["measured"]}
    assert methods == {"plain", "draft_model", "saguaro"}
    (load,) = printed["observations"]
    assert load["passes"]
    assert load["tables"]
    assert sum(count for _, count in load["ranks"]) + load["not_predicted"] > 0
    assert tuned.read(str(path)).choice["num_speculative_tokens"] in (2, 4)


@pytest.mark.long
def test_an_engine_that_starts_with_it_gives_plain_texts(answer: tuple[Path, dict[str, Any]]) -> None:
    speculation = {"method": "saguaro", "tuned": str(answer[0])}
    with_file, plain = run_engines(
        [
            {"options": {**BASE, "max_num_seqs": 8, "speculative_config": speculation}, "scenarios": [GREEDY]},
            {"options": {**BASE, "max_num_seqs": 8}, "scenarios": [GREEDY]},
        ]
    )
    assert_same_texts(with_file["greedy"], plain["greedy"])
    assert with_file["greedy"].hits + with_file["greedy"].misses > 0
    assert not with_file.log_lines("tuned file", "here"), "it is this pair, this vLLM and this machine"


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    process = command(tmp_path)
    deadline = time.monotonic() + 300
    started: list[int] = []
    while not started and time.monotonic() < deadline:
        time.sleep(0.5)
        started = below(process.pid)
    assert started, "no engine was ever started"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert all(is_gone_within(pid, 10) for pid in started)
    assert not (tmp_path / "saguaro-tuned.json").exists()
