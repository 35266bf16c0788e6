"""The benchmark without a checkout, as an installed package has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.repository import ROOT
from vllm_saguaro.benchmark import checkout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "vllm_saguaro", folder / "vllm_saguaro", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=installed,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_this_is_a_checkout() -> None:
    assert checkout.CHECKOUT == ROOT
    assert checkout.in_checkout(ROOT / "docs" / "index.md") == "docs/index.md"
    assert checkout.in_checkout(ROOT.parent) is None
    assert (checkout.PAIR / "config.json").is_file()


def test_an_installed_package_is_none(installed: Path) -> None:
    said = run(
        installed,
        "-c",
        "from vllm_saguaro.benchmark import checkout, provenance, settings\n"
        "print(checkout.CHECKOUT, provenance.git_state(), settings.relative(checkout.PAIR))",
    )
    assert said.stdout.startswith("None {'revision': None, 'dirty': None} .../pair/target"), said.stderr


def test_its_command_measures_what_is_named_and_asks_for_it_otherwise(installed: Path) -> None:
    assert run(installed, "-m", "vllm_saguaro.cli", "bench", "--help").returncode == 0
    said = run(installed, "-m", "vllm_saguaro.cli", "bench")
    assert said.returncode == 2
    assert "assets/pair/target/config.json does not exist: name the pair with --target" in said.stderr
    said = run(installed, "-m", "vllm_saguaro.cli", "bench", "--against-server", "http://127.0.0.1:1")
    assert said.returncode == 2
    assert "assets/pair/prompts.jsonl does not exist: name the prompts with --dataset-path" in said.stderr
