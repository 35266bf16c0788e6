"""`vllm-saguaro bench`: which part is meant, exit codes, what is printed and written. No engine is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.repository import ROOT
from tests.unit.benchmark.served.fake_server import FakeServer
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.cli import bench_command, bench_parts
from vllm_saguaro.cli.main import main

REPORT = str(ROOT / "docs" / "results" / "headline_12_6.json")
SMALL = ("--prompts", "2", "--tokens", "4", "--repetitions", "1")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(drafts=2)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("", "run"),
        ("--k 3", "run"),
        ("--prompts 3 --against-server http://x", "servers"),
        ("--against-server=http://x", "servers"),
        ("compare a b", "compare"),
        ("--help", "--help"),
    ],
)
def test_which_part_is_meant(words: str, part: str) -> None:
    assert bench_command.with_part(words.split())[0] == part


@pytest.mark.parametrize("part", bench_command.PARTS)
def test_every_part_has_help_with_examples_and_json(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", part, "--help"]) == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "--json" in said


def test_servers_are_measured_and_written(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--against-server", f"mine={server.url}", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "== 1 at once, T=0" in said
    (written,) = (tmp_path / "results").glob("servers-*.json")
    assert json.loads(written.read_text())["servers"]["mine"]["model"] == "pair"
    assert f"written to {written.relative_to(tmp_path)}" in said


def test_json_is_all_of_the_output(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--against-server", server.url, *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "servers"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--against-server", "http://127.0.0.1:1", *SMALL]) == 1
    said = capsys.readouterr().err
    assert said.startswith("vllm-saguaro: bench: 127.0.0.1:1: http://127.0.0.1:1/v1/models does not answer")


def test_an_engine_that_fails_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise WorkerError("plain: it died")

    monkeypatch.setattr(bench_parts, "measure", fail)
    assert main(["bench", "--modes", "plain"]) == 1
    assert capsys.readouterr().err == "vllm-saguaro: bench: plain: it died\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--target nothing", "nothing/config.json does not exist: name the pair with --target"),
        ("--against-server http://x --prompts 0", "--prompts must be at least 1"),
        ("--against-server http://x --modes plain", "bench servers: unknown option --modes: see"),
        ("--against-server ftp://x", "no address of a server"),
        ("compare nothing.json nothing.json", "No such file"),
    ],
)
def test_a_wrong_question_ends_with_2(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_reports_are_compared_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", REPORT, REPORT]) == 0
    assert "B / A" in capsys.readouterr().out
    assert main(["bench", "compare", REPORT, REPORT, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["differs"] == []
    assert {each["ratio"]["median"] for each in read["configurations"]} == {1.0}


def test_a_picture_is_where_the_answer_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.png"
    assert main(["bench", "plot", "batches", REPORT, "--plot", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"plot": str(path)}
    assert path.stat().st_size > 1000
