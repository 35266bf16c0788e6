from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.repository import ROOT
from scripts.soaking import processes, server
from scripts.soaking.settings import Settings

WAITS = "import time; time.sleep(60)"
HEALTHY = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("begin", flush=True)
"""
SERVES = "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
LEAVES_A_CHILD = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"


def leaves_memory(name: str) -> str:
    return f"open('/dev/shm/{name}', 'w').write('x')\n"


class Program(Settings):
    """Serves with a program of our own instead of vLLM."""

    program = ""

    def command(self, port: int, plain: bool) -> list[str]:
        return [sys.executable, "-c", self.program, str(port)]


def served(program: str, folder: Path) -> server.VllmServer:
    settings = Program()
    object.__setattr__(settings, "program", program)
    return server.VllmServer(settings, plain=False, log=folder / "log")


def is_gone(pid: int) -> bool:
    """Within a moment: a signal takes one."""
    deadline = time.monotonic() + 5
    while processes.is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not processes.is_alive(pid)


@pytest.fixture
def session() -> Iterator[subprocess.Popen[bytes]]:
    """A leader of a session with a child."""
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])"
    leader = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.monotonic() + 20
    while len(processes.session_members(leader.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    yield leader
    for pid in processes.session_members(leader.pid):
        os.kill(pid, 9)
    leader.wait()


def test_members_of_a_session_are_found_orphans_among_them(session: subprocess.Popen[bytes]) -> None:
    both = processes.session_members(session.pid)
    assert len(both) == 2
    session.kill()
    session.wait()
    assert processes.session_members(session.pid) == [pid for pid in both if pid != session.pid]


def test_a_process_is_looked_at(session: subprocess.Popen[bytes]) -> None:
    found = processes.look_at(session.pid)
    assert found is not None
    assert found.name == "server"
    assert found.memory > 1 << 20
    assert found.descriptors >= 3
    assert found.threads == 1
    assert processes.is_alive(session.pid)


def test_a_process_that_is_gone_is_nothing(session: subprocess.Popen[bytes]) -> None:
    session.kill()
    assert is_gone(session.pid)  # a zombie does not live
    session.wait()
    assert processes.look_at(session.pid) is None
    assert processes.start_time(session.pid) is None
    assert processes.command_line(session.pid) == ""


@pytest.mark.parametrize(
    ("line", "is_draft"),
    [
        ("python -P -m vllm_saguaro.vllm_hooks.draft_process", True),
        ("ray::SaguaroDraft", True),
        ("VLLM::Worker", False),
        ("ray::IDLE", False),
        ("vim draft.txt", False),
    ],
)
def test_a_draft_is_known_by_its_command_line(line: str, is_draft: bool) -> None:
    assert processes.is_draft(line) == is_draft


def test_a_folder_of_a_ray_of_ours_is_known_by_the_command_lines_that_name_it() -> None:
    gcs = "/ray/gcs_server --log_dir=/tmp/saguaro-ray-a1_b/session_1/logs --session-name=session_1"
    assert processes.ray_folders_in(gcs) == {"/tmp/saguaro-ray-a1_b"}
    assert processes.ray_folders_in("raylet --store=/tmp/ray/session_1 --name=saguaro-ray-x") == set()


def test_a_folder_of_a_ray_that_is_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    stays, goes = tmp_path / "saguaro-ray-stays", tmp_path / "saguaro-ray-goes"
    for folder in (stays, goes):
        folder.mkdir()
    one = served(f"#--temp-dir={stays} --temp-dir={goes}\n" + HEALTHY + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    one.snapshot()
    goes.rmdir()
    assert one.end().ray_folders == [str(stays)]


def test_shared_memory_that_somebody_has_open_has_an_owner() -> None:
    name = f"soak-test-{os.getpid()}"
    path = Path("/dev/shm") / name
    try:
        with path.open("w"):
            assert processes.without_owner({name}) == set()
            assert name in processes.names_held_by(os.getpid())
        assert processes.without_owner({name, "never-was"}) == {name}
    finally:
        path.unlink()


def test_a_server_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    one = served(HEALTHY + SERVES, tmp_path)
    assert asyncio.run(one.wait_until_up()) > 0
    assert [each.name for each in one.snapshot()] == ["server"]
    end = one.end()
    assert (end.status, end.left, end.shared_memory, end.ray_actors) == (0, [], [], 0)
    assert not one.alive
    assert one.log_text() == "begin\n"


def test_a_process_that_outlives_its_server_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    one = served(HEALTHY + LEAVES_A_CHILD + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    members = one.members()
    end = one.end()
    (left,) = end.left
    assert "time.sleep(60)" in left
    assert all(is_gone(pid) for pid in members)


def test_a_process_that_has_left_the_session_is_known_when_its_parent_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    leaves = LEAVES_A_CHILD.replace("])", "], start_new_session=True)")
    one = served(HEALTHY + leaves + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    (child,) = set(one.members()) - set(processes.session_members(one.members()[0]))
    end = one.end()
    assert [line.split()[0] for line in end.left] == [str(child)]
    assert is_gone(child)


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    one = served(HEALTHY + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    others = subprocess.Popen(["bash", "-c", "exec -a ray::DraftActor sleep 60"], start_new_session=True)
    try:
        deadline = time.monotonic() + 5
        while not processes.command_line(others.pid).startswith("ray::") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes.is_draft(processes.command_line(others.pid))
        assert one.drafts() == []
        end = one.end()
        assert (end.left, end.ray_actors) == ([], 0)
        assert processes.is_alive(others.pid)
    finally:
        others.kill()
        others.wait()


def test_ray_actors_that_a_server_leaves_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    actor = "import subprocess; subprocess.Popen(['bash', '-c', 'exec -a ray::DraftActor sleep 60'])\n"
    one = served(HEALTHY + actor + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    deadline = time.monotonic() + 5
    while not one.drafts() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(one.drafts()) == 1
    assert one.end().ray_actors == 1


@pytest.mark.parametrize("mark", [True, False])
def test_what_a_server_leaves_in_shared_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bool
) -> None:
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    name = f"{'saguaro' if mark else 'other'}-{os.getpid()}"
    one = served(HEALTHY + leaves_memory(name) + SERVES, tmp_path)
    try:
        asyncio.run(one.wait_until_up())
        end = one.end()
    finally:
        (Path("/dev/shm") / name).unlink()
    assert (name in end.shared_memory, name in end.shared_memory_of_others) == (mark, not mark)


def test_a_server_does_not_outlive_a_soak_that_is_killed(tmp_path: Path) -> None:
    program = "\n".join(
        (
            "import asyncio, pathlib, sys, time",
            "from tests.unit.scripts import test_soak_processes as here",
            "one = here.served(here.HEALTHY + here.SERVES, pathlib.Path(sys.argv[1]))",
            "asyncio.run(one.wait_until_up())",
            "print(*one.members(), flush=True)",
            "time.sleep(60)",
        )
    )
    soak = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert soak.stdout is not None
    (pid,) = map(int, soak.stdout.readline().split())
    assert processes.is_alive(pid)
    soak.kill()
    soak.wait()
    soak.stdout.close()
    assert is_gone(pid)


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    one = served("raise SystemExit('no such model')", tmp_path)
    with pytest.raises(server.ServerError, match="no such model"):
        asyncio.run(one.wait_until_up())


def test_a_server_that_does_not_listen_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "END_SECONDS", 0.3)
    monkeypatch.setattr(server, "_LEFTOVER_SECONDS", 0.3)
    deaf: Any = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    one = served(HEALTHY + deaf + SERVES, tmp_path)
    asyncio.run(one.wait_until_up())
    end = one.end()
    assert end.status is None
    assert len(end.left) == 1
    assert not one.alive


@pytest.mark.parametrize(
    ("line", "actor"),
    [
        ("ray::DraftActor.serve", True),
        ("ray::DraftActor", True),
        ("ray::IDLE", False),
        ("ray::DashboardAgent", False),
        ("ray::RuntimeEnvAgent", False),
        ("/usr/lib/ray/raylet --node", False),
    ],
)
def test_of_rays_processes_only_actors_are_actors(line: str, actor: bool) -> None:
    assert processes.is_ray_actor(line) == actor
