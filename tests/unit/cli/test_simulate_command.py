from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from scripts.repository import ROOT
from vllm_saguaro.cli import simulate_command
from vllm_saguaro.cli.main import main
from vllm_saguaro.simulation import comparison, plan, plots, published
from vllm_saguaro.simulation.world import World

RESULTS = ROOT / "docs" / "results"
SIMULATE_PAGE = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")
SMALL = ("--requests", "2", "--tokens", "40")


def test_the_command_offers_what_the_simulation_knows() -> None:
    """They are written down twice, so that the help need not import numpy."""
    assert tuple(published.WORLDS) == simulate_command.WORLDS
    assert plan.ENGINES == simulate_command.ENGINES
    assert tuple(comparison.SWEEPS) == simulate_command.SWEEPS


def test_all_four_engines_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "--k", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["AR", "SD", "SSD", "ours"]
    assert lines[0].startswith("llama-70b, batch 1, 2 requests of 40 tokens")


def test_json_has_world_engines_and_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--json",
        "--k",
        "2",
        "--engine",
        "ours",
        "--sweep",
        "latency",
        "latency",
        "--latency",
        "1",
        "--jitter",
        "0",
    ]
    assert main(["simulate", *SMALL, *words, "--hit-rate", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    world = World.from_json(found["world"])
    assert (world.latency, world.jitter, world.hits.at(3)) == (0.001, 0.0, 0.5)
    assert [engine["engine"] for engine in found["engines"]] == ["plain", "sd", "ours"]
    assert {line["value"] for line in found["sweeps"]["latency"]} == set(comparison.SWEEPS["latency"].values)


def test_a_printed_world_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--world", "qwen-32b", "--print-world"]) == 0
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    assert World.read(path) == published.QWEN_32B
    assert main(["simulate", *SMALL, "--world", str(path), "--k", "4"]) == 0


def test_a_report_is_a_world(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "docs" / "results" / "headline_12_6.json"
    assert main(["simulate", *SMALL, "--report", str(path), "--k", "4"]) == 0
    assert capsys.readouterr().out.startswith("headline_12_6: 12 + 6 layers, batch 1, T=0")


def test_a_sweep_is_a_table_of_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "--sweep", "k"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0].endswith("SD / AR  SSD / AR ours / AR")
    assert len(table) == 1 + len(comparison.SWEEPS["k"].values)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--world", "mars"], "not known"),
        (["--world", "nowhere.json"], "cannot be read"),
        (["--report", "nowhere.json"], "no report"),
        (["--k", "99"], "smaller k"),
        (["--batch", "0"], "batch"),
        (["--hit-rate", "2"], "between 0 and 1"),
        (["--plot", "x.png"], "--sweep"),
        (["--sweep", "k", "--plot", "x.foo"], "write a name that ends in .png, .svg or .pdf"),
        (["--sweep", "k", "--plot", "/dev/null/x.png"], "cannot be written: write another file with --plot"),
        (["--validate", "nowhere.json"], "no report"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("path", ["x.foo", "/dev/null/x.png", "no-matplotlib.png"])
def test_a_picture_is_refused_before_anything_is_simulated(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "compare", lambda *_: pytest.fail("it was too late"))
    if path.startswith("no-"):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", "--sweep", "k", "--plot", path]) == 2


def test_the_tables_are_printed_where_the_picture_cannot_be_written_after_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "plot_sweeps", full)
    words = ["--sweep", "k", "--engine", "ours", "--plot", str(tmp_path / "x.png")]
    assert main(["simulate", *SMALL, *words]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("the picture was not written: [Errno 28] No space left on device: 'x.png'\n")
    assert "ours / AR" in said.out
    assert "written to" not in said.out


@pytest.mark.slow
def test_docs_have_the_tables_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("headline_12_4", "headline_12_6", "curve", "batches_1_4", "large_batches_after", "large_batches")
    assert main(["simulate", "--validate", *(str(RESULTS / f"{name}.json") for name in names)]) == 0
    assert capsys.readouterr().out.strip() in SIMULATE_PAGE


@pytest.mark.slow
def test_docs_have_the_tables_by_which_a_fault_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--validate", str(RESULTS / "batches_16_64.json")]) == 0
    tables = capsys.readouterr().out.partition("\n\n| paper")[0]
    assert tables.count("| batches_16_64: ") == 4
    assert tables in SIMULATE_PAGE
