"""The folder of a Ray of our own, with processes that behave like Ray's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.placement.watching import gone, until
from vllm_saguaro.placement import ray_folder
from vllm_saguaro.placement.ray_folder import clear_abandoned_folders, clear_folder, make_folder, processes_in

AGENT = """
import os, sys, time
log = open(os.path.join(os.environ["SESSION"], "agent.log"), "w")
print("runs", flush=True)
while True:
    os.makedirs(os.environ["SESSION"], exist_ok=True)
    time.sleep(0.001)
"""
"""As Ray's agents: its command line, once it has overwritten it, says nothing; and it makes its folder anew."""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@contextlib.contextmanager
def running(code: str, *told: str, close_fds: bool = True, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process, once it has said that it runs."""
    command, its = [sys.executable, "-c", code, *told], {**os.environ, **variables}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=its, close_fds=close_fds) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "runs\n"
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def made() -> Iterator[tuple[str, int]]:
    folder, lock = make_folder()
    try:
        os.mkdir(session(folder))
        yield folder, lock
    finally:
        with contextlib.suppress(OSError):  # the test has given it up
            os.close(lock)


def session(folder: str) -> str:
    return os.path.join(folder, "session_1")


def test_what_was_told_of_the_folder_is_ended_and_then_it_goes() -> None:
    told = "print('runs', flush=True); import time; time.sleep(99)"
    with made() as (folder, _), running(told, f"--temp-dir={folder}") as daemon, running(told) as stranger:
        assert processes_in(folder) == [daemon.pid]
        clear_folder(folder)
        assert daemon.wait(60) == -signal.SIGKILL
        assert stranger.poll() is None
        assert not os.path.exists(folder)


@pytest.mark.parametrize(
    "line",
    [
        "gcs_server\0--log_dir={0}/session_1/logs\0--config_list=x",
        "raylet\0--store_socket_name=x\0--temp_dir={0}\0--head",
        "python\0-u\0log_monitor.py\0--session-dir={0}/session_1",
        "bash\0-c\0exec python default_worker.py --temp-dir={0} --webui=",
    ],
)
def test_ray_tells_its_processes_of_the_folder_in_such_lines(line: str) -> None:
    told = ray_folder._as_told("/tmp/saguaro-ray-ab+c")
    assert told.search(line.format("/tmp/saguaro-ray-ab+c").encode())
    assert not told.search(line.format("/tmp/saguaro-ray-ab+cd").encode()), "that is another one"


@pytest.mark.parametrize(
    "line",
    [
        "tail\0-f\0{0}/session_1/logs/raylet.out",
        "bash\0-c\0cd {0}; ls",
        "tensorboard\0--logdir={0}/session_1",
        "tar\0--directory={0}\0-c\0.",
        "grep\0--file={0}/patterns",
    ],
)
def test_others_name_it_in_other_lines(line: str) -> None:
    assert not ray_folder._as_told("/tmp/saguaro-ray-ab").search(line.format("/tmp/saguaro-ray-ab").encode())


def test_what_runs_in_a_folder_behind_a_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TMPDIR is a link to another place, the system names open files by that one."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
    with made() as (folder, _), running(AGENT, SESSION=session(folder)) as agent:
        assert folder.startswith(str(tmp_path / "link"))
        assert processes_in(folder) == [agent.pid]


def test_what_makes_the_folder_anew_without_naming_it_is_ended_before_it_is_removed() -> None:
    with made() as (folder, _), running(AGENT, SESSION=session(folder)) as agent:
        clear_folder(folder)
        assert until(lambda: gone(agent.pid))
        time.sleep(0.05)
        assert not os.path.exists(folder)


def test_who_reads_a_log_and_the_owners_children_are_left_alone() -> None:
    reads = "import os; log = open(os.environ['LOG']); print('runs', flush=True); import time; time.sleep(99)"
    holds = "print('runs', flush=True); import time; time.sleep(99)"
    with made() as (folder, lock):
        log = Path(session(folder), "raylet.out")
        log.touch()
        os.set_inheritable(lock, True)
        with running(reads, str(log), LOG=str(log)), running(holds, close_fds=False) as child:
            assert os.path.join(folder, "owner") in map(os.readlink, Path(f"/proc/{child.pid}/fd").iterdir())
            assert processes_in(folder) == []


def test_what_withstands_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_folder, "_BOUND_SECONDS", 0.1)
    monkeypatch.setattr(ray_folder, "processes_in", lambda _: [2**22 + 1])  # no process can have this number
    with made() as (folder, _):
        began = time.monotonic()
        clear_folder(folder)
        assert time.monotonic() - began < 5
        assert not os.path.exists(folder)


def test_a_folder_whose_owner_was_killed_is_removed_with_what_runs_there_and_no_other(tmp_path: Path) -> None:
    owner = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from vllm_saguaro.placement.ray_folder import make_folder\n"
        "folder = make_folder(); print('runs', flush=True); print(folder[0], flush=True); import time; time.sleep(99)"
    )
    strange = tmp_path / "saguaro-ray-of-an-older-kind"
    strange.mkdir()
    with made() as (mine, _), running(owner, str(tmp_path)) as process:
        assert process.stdout is not None
        theirs = process.stdout.readline().strip()
        os.mkdir(session(theirs))
        with running(AGENT, SESSION=session(theirs)) as agent:
            clear_abandoned_folders()
            assert os.path.exists(theirs)
            assert agent.poll() is None
            process.kill()
            process.wait()
            clear_abandoned_folders()
            assert not os.path.exists(theirs)
            assert until(lambda: gone(agent.pid))
        assert os.path.exists(mine)
        assert strange.exists(), "whether it has an owner nobody knows"


def test_one_that_was_taken_while_it_was_made_is_left_to_whom_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: that one still clears it, or has done so."""
    flock, tries = ray_folder.fcntl.flock, []

    def meddled(lock: int, how: int) -> None:
        tries.append(os.readlink(f"/proc/self/fd/{lock}"))
        if len(tries) == 1:
            raise BlockingIOError
        if len(tries) == 2:
            os.unlink(tries[-1])
        flock(lock, how)

    monkeypatch.setattr(ray_folder.fcntl, "flock", meddled)
    with made() as (folder, _):
        assert len(tries) == 3
        assert tries[-1] == os.path.join(folder, "owner")
