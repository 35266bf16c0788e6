"""A channel over shared memory that cannot be opened leaves nothing: one that is started again would add up."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.placement.parent import ROOT, SHAPE, open_channel
from tests.unit.placement.ray_cluster import environment
from tests.unit.placement.watching import gone
from vllm_saguaro.placement import passed_memory, shared_memory
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel
from vllm_saguaro.placement.ray_channel import RayChannel, RayDraft
from vllm_saguaro.placement.shared_memory import SharedMemoryChannel


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "no more of it")


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("where", "what"), [(os, "eventfd"), (mmap, "mmap"), (shared_memory, "Mailbox")])
def test_one_that_gets_half_of_what_it_needs(monkeypatch: pytest.MonkeyPatch, where: object, what: str) -> None:
    before = descriptors()
    monkeypatch.setattr(where, what, refuse)
    with pytest.raises(OSError, match="no more of it"):
        SharedMemoryChannel(SHAPE)
    assert len(descriptors()) == len(before)


def test_one_whose_process_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError, match="no more of it"):
        open_channel()
    assert len(descriptors()) == len(before)


def test_one_in_ray_whose_placer_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = descriptors()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError, match="no more of it"):
        RayChannel(RayDraft("module", {}, [0], 1), SHAPE)
    assert len(descriptors()) == len(before)
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(passed_memory, "Listener", refuse)
    with pytest.raises(OSError, match="no more of it"):
        PassedMemoryChannel(SHAPE)
    assert len(descriptors()) == len(before)


OPENED: dict[str, Callable[[], Any]] = {
    "process": open_channel,
    "passed memory": lambda: PassedMemoryChannel(SHAPE),
    "network": lambda: NetworkChannel("127.0.0.1", SHAPE),
}


@pytest.mark.parametrize("kind", OPENED)
def test_one_that_gets_no_thread(kind: str, monkeypatch: pytest.MonkeyPatch, no_thread: None) -> None:
    began: list[int] = []
    popen = subprocess.Popen

    def begin(*given: Any, **more: Any) -> Any:
        process = popen(*given, **more)
        began.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", begin)
    before = descriptors()
    with pytest.raises(RuntimeError, match="new thread"):
        OPENED[kind]()
    assert len(descriptors()) == len(before)
    assert len(began) == (kind == "process")
    assert all(map(gone, began))


def test_one_in_ray_that_gets_no_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_thread: None) -> None:
    before, folders = descriptors(), tmp_path / "folders"
    folders.mkdir()
    (tmp_path / "ray.py").write_text("raise ImportError('there is no Ray here')")
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    with pytest.raises(RuntimeError, match="new thread"):
        RayChannel(RayDraft("module", {}, [0], 1), SHAPE, {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert len(descriptors()) == len(before)
    assert list(folders.iterdir()) == []
