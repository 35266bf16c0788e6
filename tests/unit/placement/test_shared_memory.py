"""A channel over shared memory that cannot be opened leaves nothing: one that is started again would add up."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.unit.placement.parent import SHAPE, open_channel
from vllm_saguaro.placement import passed_memory, shared_memory
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel
from vllm_saguaro.placement.ray_channel import RayChannel, RayDraft
from vllm_saguaro.placement.shared_memory import SharedMemoryChannel


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "no more of it")


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
