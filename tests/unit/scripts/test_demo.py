from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import demo
from tests.unit.benchmark.test_bench_reports import make_report
from vllm_saguaro.benchmark.options import settings_from


def test_the_options_have_the_demos_defaults() -> None:
    assert settings_from(demo.parser().parse_args([])) == demo.DEFAULTS


def test_the_server_is_asked_for_by_the_bare_word() -> None:
    command = demo.server_command(demo.DEFAULTS, 8123)
    assert command[1:5] == ["serve", str(demo.DEFAULTS.target), "--speculative-config", "saguaro"]
    assert command[command.index("--port") + 1] == "8123"
    assert command[command.index("--dtype") + 1] == "float32"


def test_the_curl_line_can_be_pasted() -> None:
    words = shlex.split(demo.curl_line(8123))
    assert words[:3] == ["curl", "-s", "http://localhost:8123/v1/completions"]
    request = json.loads(words[words.index("-d") + 1])
    assert request["model"] == demo.SERVED_NAME
    assert request["prompt"].endswith("\n")


def test_table_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = make_report()
    monkeypatch.setattr(demo, "measure", lambda *arguments: report)
    output = tmp_path / "demo.json"
    demo.show(demo.DEFAULTS, output)
    printed = capsys.readouterr().out
    assert "target waits" in printed
    assert printed.splitlines()[-2:] == [f"JSON  {output}", f"plot  {output.with_suffix('.png')}"]
    assert json.loads(output.read_text())["runs"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
