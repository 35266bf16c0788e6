from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting import link

ECHO = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as stream:
    while data := stream.recv(100):
        stream.sendall(data)
"""


@dataclass
class Linked:
    """Another process, and our end of a stream to it."""

    process: subprocess.Popen[bytes]
    stream: socket.socket

    def answers(self) -> bool:
        self.stream.sendall(b"x")
        readable, _, _ = select.select([self.stream], [], [], 1.0)
        return bool(readable) and self.stream.recv(100) == b"x"


@pytest.fixture
def linked() -> Iterator[Linked]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        process = subprocess.Popen([sys.executable, "-c", ECHO, str(listener.getsockname()[1])])
        stream, _ = listener.accept()
    with stream:
        yield Linked(process, stream)
    process.kill()
    process.wait()


def test_both_ends_of_a_stream_are_found(linked: Linked) -> None:
    ends = link.between(linked.process.pid, [linked.process.pid, os.getpid()])
    assert ends is not None
    theirs, ours = ends
    assert (theirs.pid, ours.pid) == (linked.process.pid, os.getpid())
    assert ours.descriptor == linked.stream.fileno()
    assert (theirs.local, theirs.remote) == (ours.remote, ours.local)


def test_processes_that_do_not_speak_to_each_other_have_no_link(linked: Linked) -> None:
    assert link.between(linked.process.pid, [os.getppid()]) is None
    linked.stream.close()
    linked.process.wait()
    assert link.streams_of(linked.process.pid) == []


@pytest.mark.parametrize("which", [0, 1])
def test_an_end_that_is_silenced_hears_nothing(linked: Linked, which: int) -> None:
    assert linked.answers()
    ends = link.between(linked.process.pid, [os.getpid()])
    assert ends is not None
    try:
        link.silence(ends[which])
    except PermissionError:
        pytest.skip("no debugger's rights here")
    assert not linked.answers()


def test_neither_end_is_closed_by_it(linked: Linked) -> None:
    ends = link.between(linked.process.pid, [os.getpid()])
    assert ends is not None
    try:
        link.silence(ends[0])
    except PermissionError:
        pytest.skip("no debugger's rights here")
    time.sleep(0.1)
    assert ends[0] in link.streams_of(linked.process.pid)
    assert linked.process.poll() is None


def test_a_process_that_is_gone_is_an_error_of_the_system(linked: Linked) -> None:
    ends = link.between(linked.process.pid, [os.getpid()])
    assert ends is not None
    linked.process.kill()
    linked.process.wait()
    with pytest.raises(ProcessLookupError):
        link.silence(ends[0])
