"""The command line itself: help, exit codes, and what it imports."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys

import pytest

from scripts.repository import ROOT
from vllm_saguaro.cli import doctor_command, main, simulate_command, watch_command
from vllm_saguaro.cli.usage import UsageError


def test_help_has_examples_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in ("doctor", "tune", "simulate", "bench", "watch"):
        assert f"vllm-saguaro {name}" in said
        assert main.main([name, "--help"]) == 0
        own = capsys.readouterr().out
        assert "examples:" in own
        assert "--json" in own
        codes = own.partition("exit codes:")[2].split()
        assert {"0", "1", "2", "130"} <= set(codes), name


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["simulate", "--k", "many"]])
def test_a_wrong_question_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("simulate --wrld x", "simulate: unknown option --wrld: see vllm-saguaro simulate --help"),
        ("doctor --kk=3", "doctor: unknown option --kk: see vllm-saguaro doctor --help"),
        ("doctor a b c", "doctor: one word too many, 'c': see vllm-saguaro doctor --help"),
        ("bench --kk 3", "bench run: unknown option --kk: see vllm-saguaro bench run --help"),
    ],
)
def test_what_nobody_asked_for_is_named_with_the_help_that_has_the_options(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words.split()) == 2
    assert capsys.readouterr().err == f"vllm-saguaro: {says}\n"


@pytest.mark.parametrize(("command", "package"), [("simulate", "numpy"), ("watch x", "numpy")])
def test_a_package_that_is_missing_is_one_line(command: str, package: str) -> None:
    code = (
        "import sys\nfrom vllm_saguaro.cli.main import main\n"
        f"sys.modules[{package!r}] = None\nsys.exit(main({command.split()!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"vllm-saguaro: {command.split()[0]} needs {package}, which is not installed for this Python: "
        "see vllm-saguaro doctor\n"
    )


def test_a_module_of_our_own_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def miss(_: object) -> int:
        raise ModuleNotFoundError("No module named 'vllm_saguaro.x'", name="vllm_saguaro.x")

    monkeypatch.setattr(watch_command, "run", miss)
    with pytest.raises(ModuleNotFoundError):
        main.main(["watch", "http://localhost"])


def test_a_usage_error_is_one_line_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> int:
        raise UsageError("that cannot be: write this")

    monkeypatch.setattr(watch_command, "run", refuse)
    assert main.main(["watch", "http://localhost"]) == 2
    assert capsys.readouterr().err == "vllm-saguaro: that cannot be: write this\n"


def test_what_stands_after_two_dashes_reaches_doctor_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def note(arguments: argparse.Namespace) -> int:
        seen.append(arguments.vllm_words)
        return 0

    monkeypatch.setattr(doctor_command, "run", note)
    assert main.main(["doctor", "t", "--", "--dtype", "float32", "--", "x"]) == 0
    assert seen == [["--dtype", "float32", "--", "x"]]
    assert main.main(["watch", "http://localhost", "--", "--dtype"]) == 2
    assert "after --" in capsys.readouterr().err


def test_the_package_installs_the_command() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (module, name) = re.search(r'"vllm-saguaro = ([\w.]+):(\w+)"', text).groups()  # type: ignore[union-attr]
    assert getattr(importlib.import_module(module), name) is main.main


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate_command, "run", stop)
    assert main.main(["simulate"]) == 130


def test_nothing_heavy_is_imported_for_the_help() -> None:
    code = (
        "import sys\nfrom vllm_saguaro.cli.main import main\nmain(['doctor', '--help'])\n"
        "print('heavy:', sorted({n.partition('.')[0] for n in sys.modules} "
        "& {'torch', 'vllm', 'numpy', 'transformers', 'ray', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
