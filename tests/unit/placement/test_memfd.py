from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator

import pytest

from vllm_saguaro.placement import memfd
from vllm_saguaro.placement.memfd import keeps_its_size, sealed_memfd


@pytest.fixture
def fd() -> Iterator[int]:
    made = sealed_memfd("saguaro-test", 3 * mmap.PAGESIZE)
    yield made
    os.close(made)


def test_it_is_as_large_as_asked_for_and_zero(fd: int) -> None:
    with mmap.mmap(fd, 3 * mmap.PAGESIZE) as memory:
        assert bytes(memory) == bytes(3 * mmap.PAGESIZE)


def test_only_its_user_may_open_it(fd: int) -> None:
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600


def test_it_has_no_name_and_is_not_inherited_by_chance(fd: int) -> None:
    assert os.fstat(fd).st_nlink == 0
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("size", [0, mmap.PAGESIZE, 4 * mmap.PAGESIZE])
def test_nobody_can_change_its_size(fd: int, size: int) -> None:
    """Memory that gets smaller ends the process that touches it, and no handler can help."""
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)


def test_whether_it_keeps_its_size_is_seen_by_whom_it_is_handed_to(fd: int) -> None:
    assert keeps_its_size(fd)
    others = [os.memfd_create("saguaro-test", os.MFD_ALLOW_SEALING), os.eventfd(0), *os.pipe()]
    assert [keeps_its_size(other) for other in others] == [False] * 4
    for other in others:
        os.close(other)


def test_a_failure_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(memfd.os, "fchmod", refuse)
    with pytest.raises(OSError, match="no"):
        sealed_memfd("saguaro-test", 8)
    assert len(os.listdir("/proc/self/fd")) == before
