"""The two sides meet late: behind strangers, at a full door, or after one of them has stood still for a while."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.unit.placement.far_draft import SHAPE
from vllm_saguaro.placement import meeting
from vllm_saguaro.placement.arrival import come
from vllm_saguaro.placement.meeting import Invitation, Listener, Refused, knock
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel, PassedMemoryEnd
from vllm_saguaro.placement.shared_memory import SharedMemoryChannel


def visit(invitation: Invitation) -> socket.socket:
    """Come to a door, and say nothing."""
    if invitation.port:
        return socket.create_connection((invitation.address, invitation.port), 10)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect("\0" + invitation.address)
    except OSError:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def handing_over(
    after: float = 0.0,
) -> Iterator[tuple[Future[PassedMemoryEnd], socket.socket, SharedMemoryChannel]]:
    """A draft side that has been let in after so many seconds, its connection, and a mailbox for it."""
    mailbox, listener = SharedMemoryChannel(SHAPE), Listener(SHAPE)
    with ThreadPoolExecutor(1) as threads:
        coming = threads.submit(PassedMemoryEnd, listener.invitation)
        coming.add_done_callback(lambda _: listener.stop())  # it has failed: nobody comes
        time.sleep(after)
        connection = listener.accept()
        assert connection is not None
        with connection:
            yield coming, connection, mailbox
    mailbox._let_go()


@pytest.mark.parametrize("network", [True, False])
def test_the_draft_side_waits_for_its_turn_behind_strangers(network: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the door for as long as it may: a draft side of no more patience would be gone when it is asked in."""
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 1.0)
    opened = NetworkChannel("127.0.0.1", SHAPE) if network else PassedMemoryChannel(SHAPE)
    with contextlib.closing(opened), contextlib.ExitStack() as strangers:
        for _ in range(3):
            strangers.enter_context(visit(opened.invitation))
        come(opened.invitation).close()


def test_the_draft_side_waits_at_a_door_whose_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "_BACKLOG", 1)
    listener, full = Listener(SHAPE), False
    with contextlib.ExitStack() as strangers, ThreadPoolExecutor(1) as threads:
        while not full:
            try:
                strangers.enter_context(visit(listener.invitation))
            except BlockingIOError:
                full = True
        coming = threads.submit(knock, listener.invitation)
        time.sleep(0.3)
        assert not coming.done()
        inside = listener.accept()
        assert inside is not None
        inside.close()
        coming.result(60).close()


def test_the_draft_side_waits_for_a_target_side_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it answers, and before it hands the memory over."""
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 1.0)
    with handing_over(after=1.3) as (coming, connection, mailbox):
        time.sleep(1.3)
        socket.send_fds(connection, [b"M"], [mailbox._memory_fd, mailbox._bell_fd])
        coming.result(60).close()


def test_nobody_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 0.2)
    listener = Listener(SHAPE)
    with pytest.raises(Refused, match="hung up"):
        knock(listener.invitation)
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 1.0)
    with handing_over() as (coming, _, _), pytest.raises((TimeoutError, Refused)):
        coming.result(60)
    listener.close()


def test_what_came_while_this_process_stood_still_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"hello")
        long_ago = time.monotonic() - 100
        assert meeting._receive(ours, 5, long_ago) == b"hello"
        with pytest.raises(meeting.Stranger):
            meeting._receive(ours, 1, long_ago)


def test_memory_that_a_target_side_could_make_smaller_is_not_touched() -> None:
    """It would end the process that touches it: a pool, with all its engines."""
    with handing_over() as (coming, connection, mailbox):
        memory_fd = os.memfd_create("saguaro-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(memory_fd, bytes(mailbox._memory))
        socket.send_fds(connection, [b"M"], [memory_fd, mailbox._bell_fd])
        os.close(memory_fd)
        with pytest.raises(Refused, match="smaller"):
            coming.result(60)
