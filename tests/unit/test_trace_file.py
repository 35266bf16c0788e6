"""The file of a trace: valid at any moment, bounded, and refused in one line where it cannot be."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_saguaro import trace_file
from vllm_saguaro.config import SaguaroConfigError
from vllm_saguaro.trace_file import TraceFile, checked_path


def events(path: Path) -> list[object]:
    """What a viewer finds: the array, whose end is left out."""
    text = path.read_text(encoding="utf-8")
    found: list[object] = json.loads(text.rstrip().rstrip(",") + "]")
    lines = text.splitlines()
    assert lines[0] == "["
    assert [json.loads(line.removesuffix(",")) for line in lines[1:]] == found
    assert all(line.endswith(",") for line in lines[1:])
    return found


def refusal(path: str | Path) -> str:
    with pytest.raises(SaguaroConfigError) as caught:
        checked_path(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_it_is_whole_after_every_call(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(str(path))
    assert events(path) == []
    file.append(['{"a":1}', '{"b":"ü"}'])
    assert events(path) == [{"a": 1}, {"b": "ü"}]
    file.append([])
    file.append(['{"c":3}'])
    assert events(path) == [{"a": 1}, {"b": "ü"}, {"c": 3}]
    file.close()


def test_beyond_its_bound_nothing_of_a_call_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(str(path), most_bytes=20)
    file.append(['{"a":1}'])
    with pytest.raises(OSError, match="it may have 20 bytes at most"):
        file.append(['{"b":2}', '{"c":3}'])
    assert events(path) == [{"a": 1}]
    file.append(['{"d":4}'])
    assert events(path) == [{"a": 1}, {"d": 4}]
    file.close()


@contextlib.contextmanager
def small_files(most: int) -> Iterator[None]:
    """This process may write no file of more than so many bytes, as on a disk that is full.

    No longer than what is tried: the tests' own output may go to a file.
    """
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_where_the_disk_is_full_half_an_event_is_taken_back(tmp_path: Path) -> None:
    path, most = tmp_path / "trace.json", 4096
    file = TraceFile(str(path))
    file.append(['{"a":1}'])
    with pytest.raises(OSError) as caught, small_files(most):  # noqa: PT011 - which one it is follows
        file.append([json.dumps({"long": "x" * most})])
    assert caught.value.errno == errno.EFBIG
    assert events(path) == [{"a": 1}]
    file.close()


def test_a_path_becomes_absolute_and_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked_path("here.json") == str(tmp_path / "here.json")
    assert checked_path("~/home.json") == str(tmp_path / "home.json")
    assert events(tmp_path / "here.json") == events(tmp_path / "home.json") == []


def test_a_trace_of_before_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(str(path))
    file.append(['{"a":1}'])
    file.close()
    checked_path(str(path))
    assert events(path) == [{"a": 1}], "an engine may be writing it, and somebody only asks"
    TraceFile(str(path)).close()
    assert events(path) == []


def test_an_empty_file_and_a_link_to_nowhere_are_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    checked_path(str(tmp_path / "empty"))
    checked_path(str(tmp_path / "link"))
    assert events(tmp_path / "behind") == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    assert refusal(folder / "trace.json") == (
        f"trace: there is no folder {folder}: make it, or name a file in one that is there"
    )


@pytest.mark.parametrize("content", [b"model weights", b"[1, 2]", b"{}", b'[\n  {"a": 1}\n]\n', b"[\n]"])
def test_what_is_no_trace_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert refusal(path) == f"trace: {path} is there and is no trace: name another file, or remove it"
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/full")
    assert "is there and is no trace" in refusal(path)


def test_a_disk_without_room_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.symlink_to("/dev/full")
    monkeypatch.setattr(trace_file, "_is_trace", lambda path: True)
    assert refusal(path) == (
        f"trace: {path} cannot be written (No space left on device): name a file where you may write and there is room"
    )


def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(The tests may run as root, who may write anything: so the system's answer is given by hand.)"""

    def denied(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(trace_file, "open", denied, raising=False)
    assert "cannot be written (Permission denied)" in refusal(tmp_path / "trace.json")
