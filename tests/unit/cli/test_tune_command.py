"""`vllm-saguaro tune`: what it asks for, prints and refuses; the engines are made up here."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tuning.test_tuning_session import HERE, Machine
from vllm_saguaro import tuned
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.progress import Progress, ProgressBar
from vllm_saguaro.cli import tune_command
from vllm_saguaro.cli.main import main
from vllm_saguaro.cli.tune_command import Question
from vllm_saguaro.cli.usage import UsageError
from vllm_saguaro.tuning import document, plots, session
from vllm_saguaro.tuning.found import Tuning
from vllm_saguaro.tuning.settings import Settings, TuningError

SETTINGS = Settings("target", "draft", batches=(1,), temperatures=(0.0,), ks=(1, 4))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into, and a pair that nobody looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune_command, "ask", lambda _: Question(SETTINGS, HERE, draft_is_own=True))
    monkeypatch.setattr(session, "SIZES", (4,))
    monkeypatch.setattr(session.tune, "__defaults__", (Machine(lambda keys: 1.5),))
    return tmp_path


def test_it_writes_the_file_and_says_how_to_serve_with_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "target", "--output", "mine.json", "--", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "saguaro is the fastest: plain 1.00, draft_model 1.20, saguaro 1.50 times plain" in said
    assert 'vllm serve target --speculative-config \'{"method": "saguaro", "tuned": "mine.json"}\'' in said
    file = tuned.read(str(here / "mine.json"))
    assert file.choice["num_speculative_tokens"] in SETTINGS.ks
    data = json.loads((here / "mine.json").read_text())
    assert data["provenance"]["command"] == "vllm-saguaro tune target --output mine.json -- --dtype float32"
    assert data["provenance"]["versions"]["torch"]
    assert data["provenance"]["processor"]["cores"] == os.cpu_count()


def test_the_server_gets_the_words_and_keys_that_were_tuned_with(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        *("--dtype", "float32", "--speculative_config.draft_cpus", "1", "-sc", "{}", "--spec-tokens=2"),
        *("--speculative-config={}", "--spec_method", "saguaro", "--served-model-name", "a b"),
    )
    settings = dataclasses.replace(SETTINGS, words=words, fixed={"draft_cpus": "1", "num_speculative_tokens": 4})
    monkeypatch.setattr(tune_command, "ask", lambda _: Question(settings, HERE, draft_is_own=True))
    assert main(["tune", "target"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    *before, option, config = shlex.split(line)
    assert before == ["vllm", "serve", "target", "--dtype", "float32", "--served-model-name", "a b"]
    assert option == "--speculative-config"
    assert json.loads(config) == {"method": "saguaro", **settings.fixed, "tuned": tune_command.OUTPUT}


def test_json_is_what_was_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "target", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((here / tune_command.OUTPUT).read_text())


def test_what_is_faster_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session.tune, "__defaults__", (Machine(lambda keys: 0.7, baseline=0.9),))
    assert main(["tune", "target"]) == 0
    said = capsys.readouterr().out
    assert "plain vLLM is faster than saguaro here: plain 1.00, draft_model 0.90, saguaro 0.70 times plain" in said
    assert "fastest at 1 at once: plain" in said


def test_what_is_hardly_faster_is_called_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the gain is that of what was chosen: another one within the margin was faster still."""
    machine = Machine(lambda keys: 1.021 if keys.get("backup") == "none" else 1.01, baseline=0.9)
    monkeypatch.setattr(session.tune, "__defaults__", (machine,))
    assert main(["tune", "target"]) == 0
    said = capsys.readouterr().out
    assert "saguaro is the fastest, by less than 2%: plain 1.00, draft_model 0.90, saguaro 1.01 times plain" in said


def test_there_is_a_bar_where_somebody_looks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Progress] = []
    tune = session.tune

    def noting(settings: Settings, progress: Progress) -> Tuning:
        given.append(progress)
        return tune(settings, Progress())

    monkeypatch.setattr(session, "tune", noting)
    for looks in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda looks=looks: looks)
        assert main(["tune", "target"]) == 0
    assert [type(bar) for bar in given] == [ProgressBar, Progress]


def test_a_picture_has_every_candidate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["tune", "target", "--picture", "p.svg"]) == 0
    assert "written to saguaro-tuned.json and p.svg" in capsys.readouterr().out
    drawn = (here / "p.svg").read_text()
    assert drawn.startswith("<?xml")
    for label in (
        "N = 4, predicted",
        "plain, measured",
        "draft_model, measured",
        "chosen, measured",
        "with another N",
    ):
        assert label in drawn


@pytest.mark.parametrize("name", ["p.txt", "picture"])
def test_a_picture_needs_a_kind(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "target", "--picture", name]) == 2
    assert "write a name that ends in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (here / "file").touch()
    monkeypatch.setattr(tune_command, "ask", lambda _: pytest.fail("it was too late"))
    assert main(["tune", "target", "--picture", "file/p.png"]) == 2
    assert capsys.readouterr().err == (
        "vllm-saguaro: tune: file/p.png cannot be written: write another file with --picture\n"
    )


def test_what_was_measured_is_kept_where_the_picture_cannot_be_written_after_all(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "p.png")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "plot", full)
    assert main(["tune", "target", "--picture", "p.png"]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("the picture was not written: [Errno 28] No space left on device: 'p.png'\n")
    assert "written to saguaro-tuned.json\n" in said.out


def test_the_prompts_are_named_as_in_bench(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def note(arguments: argparse.Namespace) -> Question:
        seen.append(arguments.prompts)
        raise UsageError("enough")

    monkeypatch.setattr(tune_command, "ask", note)
    assert main(["tune", "target", "--prompt-file", "a.jsonl"]) == 2
    assert main(["tune", "target", "--prompts", "a.jsonl"]) == 2
    assert seen == [Path("a.jsonl"), Path("a.jsonl")]


def test_without_matplotlib_a_picture_is_refused_before_anything_is_measured(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(tune_command, "ask", lambda _: pytest.fail("it was too late"))
    assert main(["tune", "target", "--picture", "p.png"]) == 2
    assert "pip install matplotlib, or leave --picture out" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TuningError("no room: write less"), UsageError("tune: no room: write less")])
def test_a_wrong_question_is_one_line_and_ends_with_2(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def refuse(_: object) -> Any:
        raise error

    monkeypatch.setattr(tune_command, "ask", refuse)
    assert main(["tune", "target"]) == 2
    assert capsys.readouterr().err == "vllm-saguaro: tune: no room: write less\n"


def test_an_engine_that_does_not_run_ends_with_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Any:
        raise WorkerError("plain: out of memory")

    monkeypatch.setattr(session.tune, "__defaults__", (fail,))
    assert main(["tune", "target"]) == 1
    assert "an engine did not run: plain: out of memory" in capsys.readouterr().err
    assert not (here / tune_command.OUTPUT).exists()


def test_ctrl_c_ends_with_130_and_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.tune, "__defaults__", (stop,))
    assert main(["tune", "target"]) == 130
    assert not (here / tune_command.OUTPUT).exists()


def test_a_file_that_cannot_be_written_is_refused_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "target", "--output", str(here)]) == 2
    assert "cannot be written: write another file with --output" in capsys.readouterr().err
    assert main(["tune", "target", "--output", "new/folder/tuned.json"]) == 0


def test_below_a_file_nothing_can_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").touch()
    assert main(["tune", "target", "--output", "file/out.json"]) == 2
    assert "file/out.json cannot be written" in capsys.readouterr().err
    assert main(["tune", "target", "--output", "file"]) == 0


def test_what_cannot_be_written_after_all_is_printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "saguaro-tuned.json")

    monkeypatch.setattr(document, "write", full)
    assert main(["tune", "target"]) == 1
    said = capsys.readouterr()
    assert "the file was not written, here is what it would hold: [Errno 28] No space left" in said.err
    assert json.loads(said.out)["kind"] == tuned.KIND


def test_the_environment_of_the_engines_is_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    with tune_command.environment_kept():
        os.environ["KEPT"] = "2"
        os.environ["NEW"] = "3"
    assert os.environ["KEPT"] == "1"
    assert "NEW" not in os.environ
