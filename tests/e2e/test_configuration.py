"""What a user sees in a terminal: one line that says what to write, and an exit status. No engine is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.vllm_hooks.model_folder import write_model

pytestmark = pytest.mark.slow  # each command imports all of vLLM


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights and without a draft, of a family that nobody knows."""
    return write_model(tmp_path_factory.mktemp("target"))


def vllm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )


def own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "vllm_saguaro: " in line or "error: " in line]


def test_serve_with_a_mistyped_key(target: Path) -> None:
    done = vllm("serve", target, "--speculative-config", '{"method": "saguaro", "branchs": 3}')
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = own_lines(done)
    assert line.endswith('unknown key "branchs" in the speculative config: did you mean "branches"?')


@pytest.mark.long
def test_serve_with_a_missing_folder(target: Path) -> None:
    options = {"method": "saguaro", "model": "./no/such/draft"}
    done = vllm("serve", target, "--speculative-config", json.dumps(options))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = own_lines(done)
    assert line.startswith("vllm_saguaro: the draft folder does not exist: ./no/such/draft; write")


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        pytest.param(("bench", "latency", "--model"), marks=pytest.mark.long),
        pytest.param(("bench", "throughput", "--model"), marks=pytest.mark.long),
    ],
)
def test_the_bare_word_where_no_draft_is_known(target: Path, command: tuple[str, ...]) -> None:
    lengths = ("--input-len", "8", "--output-len", "8") if command[0] == "bench" else ()
    done = vllm(*command, target, "--speculative-config", "saguaro", *lengths)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = own_lines(done)
    assert line.startswith("vllm_saguaro: no draft model is known for the target ")


def test_serve_with_a_config_file_and_flags(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("speculative-config:\n  method: saguaro\n  placement: gpu\n")
    done = vllm("serve", target, "--config", file)
    assert done.returncode == 2
    expected = 'placement: "gpu" is not a known value: write "process" or "stream" or "inline" or "ray"'
    assert own_lines(done)[-1].endswith(expected)
    done = vllm("serve", target, "--spec-method", "saguaro", "--spec-tokens", "40")
    assert done.returncode == 1
    assert "num_speculative_tokens is out of range: 40; write a number from 1 to 16" in own_lines(done)[-1]
