from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import faults
from scripts.faulting.settings import DEFAULT_RESTARTS, KINDS_OF, Kind, Serving, Settings
from vllm_saguaro.benchmark.settings import SettingsError


def saguaro(serving: Serving) -> dict[str, Any]:
    command = serving.command(1234, plain=False)
    found: dict[str, Any] = json.loads(command[command.index("--speculative-config") + 1])
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--concurrency", "0"], "--concurrency must be from 1 to 16"),
        (["--option", "brunches=3"], "saguaro has no such key"),
        (["--option", "placement=ray"], "write --placement"),
        (["--placement", "process", "--only", "cut"], "of --placement process there are kill, hang, slow, oom, dying"),
        (["--target", "/nowhere"], "name the pair with --target"),
    ],
)
def test_a_wrong_option_gets_one_line_that_says_what_to_write(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected) as error:
        faults.settings_from(faults.parser().parse_args(words))
    assert "\n" not in str(error.value)


def test_without_ray_its_placements_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="--placement process"):
        Settings().check()
    Settings(placements=("process",)).check()


def test_a_wrong_option_has_a_status_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        faults.main(["--seconds", "-1", "--output", str(tmp_path / "out.json")])
    assert end.value.code == faults.WRONG_OPTION


def test_all_faults_of_a_placement_are_done_unless_some_are_named() -> None:
    assert Settings().kinds("process") == KINDS_OF["process"]
    assert Settings(only=(Kind.CUT, Kind.KILL)).kinds("nodes") == (Kind.KILL, Kind.CUT)


@pytest.mark.parametrize("placement", KINDS_OF)
def test_a_draft_that_dies_at_every_start_comes_last(placement: str) -> None:
    assert Kind.DYING not in KINDS_OF[placement][:-1]


def test_there_are_restarts_enough_for_all_faults() -> None:
    assert saguaro(Serving(Settings(only=(Kind.KILL,)), "process"))["draft_restarts"] == DEFAULT_RESTARTS
    many = Settings(only=tuple(Kind))
    for placement in KINDS_OF:
        ended = sum(kind not in (Kind.SLOW, Kind.DYING) for kind in many.kinds(placement))
        assert Serving(many, placement).restarts >= ended + 2


def test_the_draft_is_put_where_the_placement_says() -> None:
    assert "placement" not in saguaro(Serving(Settings(), "process"))
    ray = saguaro(Serving(Settings(options={"branches": 6}), "ray"))
    assert (ray["placement"], ray["branches"], "ray_options" in ray) == ("ray", 6, False)
    nodes = saguaro(Serving(Settings(), "nodes", "127.0.0.1:6"))
    assert nodes["ray_options"] == {"address": "127.0.0.1:6", "resources": {"far": 1}}


def test_the_plain_server_has_no_draft() -> None:
    assert "--speculative-config" not in Serving(Settings(), "process").command(1234, plain=True)
