"""The network link with a peer that is slow, broken or lies: the channel ends, or the draft side does; nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.far_draft import SHAPE, drafting
from tests.unit.placement.test_far_draft import admit, table_of
from tests.unit.placement.watching import until
from vllm_saguaro.messages import Release, Round, Stamp, Step, Table, Work
from vllm_saguaro.placement import frames, meeting
from vllm_saguaro.placement.channel import DraftFailed
from vllm_saguaro.placement.draft_end import SLEEP_MILLISECONDS, TargetGone
from vllm_saguaro.placement.frames import Kind, encode_table, pack
from vllm_saguaro.placement.mailbox import DraftState
from vllm_saguaro.placement.meeting import Invitation, Listener, Refused, knock
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.network_end import FarMailbox, NetworkEnd
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel
from vllm_saguaro.placement.wire import encode

READY = pack(Kind.STATE, frames.STATE.pack(int(DraftState.READY), 100))
KEYS = Table(Stamp(1, 1, 0), [0, 1], [3, 4], [])


@pytest.fixture
def channel() -> Iterator[NetworkChannel]:
    opened = NetworkChannel("127.0.0.1", SHAPE)
    yield opened
    opened.close()


@pytest.fixture
def peer(channel: NetworkChannel) -> Iterator[socket.socket]:
    """A draft side that has been let in, and of which the test writes every byte."""
    with knock(channel.invitation) as connection:
        connection.sendall(READY)
        channel.wait_until_ready()
        yield connection


# ---- the door -------------------------------------------------------------------------------------------------------


def answered(connection: socket.socket) -> bool:
    """Whether the other side says anything before it hangs up."""
    connection.settimeout(60)
    with contextlib.suppress(ConnectionError):
        return bool(connection.recv(100))
    return False


def hello(invitation: Invitation, version: int = meeting.VERSION) -> bytes:
    shape = struct.pack(f"<{len(dataclasses.fields(invitation.shape))}q", *dataclasses.astuple(invitation.shape))
    return struct.pack("<4sH32s", b"SGLK", version, invitation.token) + shape


def connect(invitation: Invitation) -> socket.socket:
    return socket.create_connection((invitation.address, invitation.port), 10)


@pytest.mark.parametrize("spoil", ["token", "magic", "nothing but noise", "silence"])
def test_a_stranger_is_hung_up_on_and_the_draft_side_still_comes_in(channel: NetworkChannel, spoil: str) -> None:
    invitation = channel.invitation
    wrong = {
        "token": hello(dataclasses.replace(invitation, token=bytes(32))),
        "magic": b"HTTP" + hello(invitation)[4:],
        "nothing but noise": b"\xff" * 500,
        "silence": b"",
    }[spoil]
    with connect(invitation) as stranger:
        stranger.sendall(wrong)
        if spoil == "silence":
            stranger.shutdown(socket.SHUT_WR)
        assert not answered(stranger)
    assert channel.alive
    with drafting(invitation):
        channel.wait_until_ready()
        channel.close()


@settings(deadline=None)
@given(st.integers(0, 200), st.binary(max_size=200))
def test_any_bytes_at_the_door_let_nobody_in_but_the_right_ones(right: int, more: bytes) -> None:
    """So much of the right hello, and then whatever comes: a stranger, or one who is told why not."""
    listener = Listener(SHAPE)
    token = listener.invitation.token
    hello = meeting._PREFIX.pack(meeting._MAGIC, meeting.VERSION, token)
    hello += meeting._SHAPE.pack(*dataclasses.astuple(SHAPE))
    said = hello[:right] + more
    ours, theirs = socket.socketpair()
    with listener._socket, ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        if said[: len(hello)] == hello:
            listener._greet(ours)
        else:
            with pytest.raises((meeting.Stranger, Refused, OSError)):
                listener._greet(ours)


def test_a_door_that_cannot_open_does_not_keep_a_core_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no descriptor is left the visitor stays at the door, and `accept` fails at once, time after time."""
    listener, tries = Listener(SHAPE, "127.0.0.1"), 0

    class Full:
        """The socket of a process that has no descriptor left."""

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            own.close()

        def accept(self) -> None:
            nonlocal tries
            tries += 1
            raise OSError(errno.EMFILE, "Too many open files")

    own = listener._socket
    monkeypatch.setattr(listener, "_socket", Full())
    waiting = threading.Thread(target=listener.accept)
    waiting.start()
    time.sleep(0.5)
    listener.stop()
    waiting.join(60)
    assert not waiting.is_alive()
    assert 1 <= tries <= 20


def test_a_visitor_who_says_nothing_keeps_nobody_waiting_for_long(
    channel: NetworkChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 1.0)
    with connect(channel.invitation), drafting(channel.invitation):
        channel.wait_until_ready()
        channel.close()


def test_a_draft_side_of_another_version_is_refused_with_a_reason(channel: NetworkChannel) -> None:
    with connect(channel.invitation) as other:
        other.sendall(hello(channel.invitation, meeting.VERSION + 1))
        assert not answered(other)
    with pytest.raises(DraftFailed, match="install the same vllm_saguaro"):
        channel.wait_until_ready()


def test_a_draft_side_of_another_shape_is_refused_with_a_reason(channel: NetworkChannel) -> None:
    with pytest.raises(Refused):
        knock(dataclasses.replace(channel.invitation, shape=dataclasses.replace(SHAPE, branches=7)))
    with pytest.raises(DraftFailed, match="expects"):
        channel.wait_until_ready()


def test_a_draft_side_does_not_stay_with_a_target_that_does_not_know_its_token() -> None:
    """Whoever has the port now: it learns nothing but a token that nobody takes any more."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        invitation = Invitation("127.0.0.1", impostor.getsockname()[1], bytes(32), SHAPE)

        def pretend() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(struct.pack("<4sH32s", b"SGLK", meeting.VERSION, bytes(32)))
                connection.recv(100)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(Refused, match="not the target"):
            knock(invitation)
        thread.join(60)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "224.0.0.1", "", "localhost"])
def test_nobody_listens_on_every_address(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        NetworkChannel(address, SHAPE)


def test_two_invitations_have_different_tokens_and_names() -> None:
    listeners = [Listener(SHAPE) for _ in range(2)]
    first, second = (listener.invitation for listener in listeners)
    for listener in listeners:
        listener.stop()
        assert listener.accept() is None
    assert first.token != second.token
    assert first.address != second.address
    assert len(first.token) == 32


def test_passed_memory_is_open_to_this_user_only_and_keeps_its_size() -> None:
    opened = PassedMemoryChannel(SHAPE)
    assert os.fstat(opened._memory_fd).st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(opened._memory_fd, 0)
    opened.close()


# ---- the target side, with a bad peer -------------------------------------------------------------------------------


def test_a_table_of_a_peer_is_read(channel: NetworkChannel, peer: socket.socket) -> None:
    peer.sendall(encode_table(KEYS))
    assert until(lambda: (found := channel.read(1)) is not None and found.bonus == [3, 4])
    assert channel.sampling_c is None
    peer.sendall(encode_table(dataclasses.replace(KEYS, sampling_c=0.1)))
    assert until(lambda: channel.sampling_c == 0.1)


LIES: dict[str, bytes] = {
    "a step": pack(Kind.STEP, b""),
    "a table of no slot": encode_table(Table(Stamp(SHAPE.slots, 1, 0), [], [], [])),
    "a depth without a table": encode_table(Table(Stamp(0, 9, 0), [0], [3], [[5]])),
    "steps taken that were not posted": pack(Kind.TAKEN, frames.TAKEN.pack(1)),
    "fewer than no steps taken": pack(Kind.TAKEN, frames.TAKEN.pack(-1)),
    "a C above 1": encode_table(dataclasses.replace(KEYS, sampling_c=1.0001)),
    "half a number": pack(Kind.TAKEN, b"1234"),
    "an unknown state": pack(Kind.STATE, frames.STATE.pack(7, 1)),
    "starting again": pack(Kind.STATE, frames.STATE.pack(int(DraftState.STARTING), 1)),
    "a negative length": pack(Kind.STATE, frames.STATE.pack(int(DraftState.READY), -1)),
    "a frame over its bound": struct.pack("<HBBI", 0x4753, Kind.TABLE, meeting.VERSION, 1 << 30),
    "noise": b"\x00" * 64,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_ends_the_channel(channel: NetworkChannel, peer: socket.socket, lie: str) -> None:
    peer.sendall(LIES[lie])
    assert until(lambda: not channel.alive)
    assert not channel.post(admit())
    assert channel.read(1) is None
    assert not answered(peer), "the stream has ended for the peer, too"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([encode_table(KEYS), READY, pack(Kind.TAKEN, frames.TAKEN.pack(0))])), st.binary())
def test_garbage_at_any_point_is_ignored_or_ends_the_channel(before: list[bytes], garbage: bytes) -> None:
    channel = NetworkChannel("127.0.0.1", SHAPE)
    with contextlib.closing(channel), knock(channel.invitation) as peer:
        peer.sendall(b"".join([READY, *before, garbage]))
        peer.shutdown(socket.SHUT_WR)
        assert until(lambda: not channel.alive)
        assert [thread for thread in channel._threads if thread.is_alive()] == [] or until(
            lambda: not any(thread.is_alive() for thread in channel._threads)
        )


@pytest.mark.parametrize("how", ["closed", "half closed", "reset"])
def test_a_stream_that_ends_ends_the_channel(channel: NetworkChannel, peer: socket.socket, how: str) -> None:
    if how == "half closed":
        peer.shutdown(socket.SHUT_WR)
    else:
        if how == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    assert until(lambda: not channel.alive)
    assert not channel.post(admit())


def test_posting_to_a_peer_that_reads_nothing_never_waits(channel: NetworkChannel, peer: socket.socket) -> None:
    posted = 0
    begun = time.monotonic()
    while channel.post(admit(posted + 1)):
        posted += 1
    assert posted > 100
    assert time.monotonic() - begun < 5, "blocked in the socket"
    assert channel.stalled_seconds > 0
    channel.close()
    assert not any(thread.is_alive() for thread in channel._threads)


@pytest.mark.parametrize("stamp", [Stamp(2**31, 1, 0), Stamp(0, 1, 2**63)])
def test_a_step_that_no_frame_can_hold_is_refused_and_raises_nothing(
    channel: NetworkChannel, peer: socket.socket, stamp: Stamp
) -> None:
    assert not channel.post(Step(releases=[Release(stamp)]))
    assert channel.post(admit(1)), "the link goes on"


def test_what_the_peer_has_taken_makes_room(channel: NetworkChannel, peer: socket.socket) -> None:
    posted = 0
    while channel.post(admit(posted + 1)):
        posted += 1
    peer.sendall(pack(Kind.TAKEN, frames.TAKEN.pack(posted // 2)))
    assert until(lambda: channel.post(admit(posted + 1)))
    assert channel.stalled_seconds > 0
    peer.sendall(pack(Kind.TAKEN, frames.TAKEN.pack(posted + 1)))
    assert until(lambda: channel.stalled_seconds == 0)


def test_a_draft_that_could_not_load_is_a_failed_draft(channel: NetworkChannel) -> None:
    with knock(channel.invitation) as connection:
        connection.sendall(pack(Kind.STATE, frames.STATE.pack(int(DraftState.FAILED), 0)))
        with pytest.raises(DraftFailed, match="load"):
            channel.wait_until_ready()


def test_a_draft_that_never_gets_ready_is_given_up(channel: NetworkChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_saguaro.placement.mailbox_channel.START_TIMEOUT_SECONDS", 0.05)
    with knock(channel.invitation), pytest.raises(DraftFailed, match="not ready"):
        channel.wait_until_ready()


def test_a_lost_node_is_looked_for_within_seconds(channel: NetworkChannel, peer: socket.socket) -> None:
    connection = channel._connection
    assert connection is not None
    options = [
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    ]
    idle, interval, count, milliseconds = options
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert idle + interval * count <= 6
    assert milliseconds <= 6000
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_link_whose_sender_cannot_be_started_ends(channel: NetworkChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(channel._threads[1], "start", refuse)
    with knock(channel.invitation), pytest.raises(DraftFailed, match="can't start new thread"):
        channel.wait_until_ready()


# ---- rounds, for a trace --------------------------------------------------------------------------------------------


def test_the_newest_rounds_of_a_draft_side_far_away_come_with_what_is_sent_next() -> None:
    shape = dataclasses.replace(SHAPE, rounds=2)
    channel = NetworkChannel("127.0.0.1", shape)
    with contextlib.closing(channel), knock(channel.invitation) as connection:
        far = FarMailbox(connection, shape)
        assert far.note is not None
        for rows in (1, 2, 3):
            far.note(Round(Work.ROUND, 1_000, 2_000, 3_000, 6_000, rows, 4))
        before = time.monotonic_ns()
        far.announce(DraftState.READY, 50)
        found: list[Round] = []

        def heard() -> bool:
            found.extend(channel.rounds())
            return len(found) == 2

        assert until(heard)
        assert [one.rows for one in found] == [2, 3]
        for one in found:
            assert before <= one.ended <= time.monotonic_ns()
            assert (one.ended - one.began, one.glued - one.began, one.forked - one.began) == (5_000, 1_000, 2_000)


def test_nobody_is_told_of_rounds_where_no_trace_is_asked_for(channel: NetworkChannel) -> None:
    with knock(channel.invitation) as connection:
        assert FarMailbox(connection, SHAPE).note is None
    assert channel.rounds() == []


# ---- the draft side, with a bad target ------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[FarMailbox, socket.socket]]:
    """A draft side, and the target's end of the stream."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield FarMailbox(ours, SHAPE), theirs


def step_frame(generation: int) -> bytes:
    return pack(Kind.STEP, encode(admit(generation)))


def test_steps_come_out_in_their_order_and_are_said_to_be_taken(pair: tuple[FarMailbox, socket.socket]) -> None:
    mailbox, target = pair
    assert mailbox.receive() is None
    target.sendall(b"".join(map(step_frame, (1, 2, 3))))
    for generation in (1, 2, 3):
        assert mailbox.receive() == admit(generation)
    assert mailbox.receive() is None
    counts = [frames.TAKEN.unpack(payload)[0] for _, payload in sent_by(target)]
    assert counts == [1, 2, 3]


def test_a_step_that_does_not_decode_is_dropped_and_the_next_one_taken(pair: tuple[FarMailbox, socket.socket]) -> None:
    mailbox, target = pair
    target.sendall(pack(Kind.STEP, b"no step") + step_frame(4))
    assert mailbox.receive() == admit(4)
    assert mailbox.dropped == 1
    assert [payload for _, payload in sent_by(target)] == [frames.TAKEN.pack(2)], "both have left the target's queue"


@pytest.mark.parametrize("how", ["closed", "garbage", "a frame over its bound", "a table"])
def test_the_draft_side_ends_with_a_target_that_is_gone_or_lies(
    pair: tuple[FarMailbox, socket.socket], how: str
) -> None:
    mailbox, target = pair
    if how == "closed":
        target.close()
    else:
        target.sendall(
            {
                "garbage": b"\xee" * 40,
                "a frame over its bound": struct.pack(
                    "<HBBI", 0x4753, Kind.STEP, meeting.VERSION, SHAPE.ring_bytes + 1
                ),
                "a table": encode_table(KEYS),
            }[how]
        )
    with pytest.raises(TargetGone):
        mailbox.receive()


def test_publishing_for_a_target_that_is_gone_says_so(pair: tuple[FarMailbox, socket.socket]) -> None:
    mailbox, target = pair
    target.close()
    with pytest.raises(TargetGone):
        mailbox.publish(KEYS)


def sent_by(target: socket.socket, flush: Callable[[], object] = lambda: None) -> list[tuple[Kind, bytes]]:
    """All frames that have come to the target's end."""
    reader = frames.FrameReader(frames.bounds_of_tables(SHAPE))
    found: list[tuple[Kind, bytes]] = []
    while select.select([target], [], [], 0.05)[0]:
        found += reader.feed(target.recv(1 << 16))
        flush()
    return found


def test_a_target_that_reads_slowly_gets_new_tables_and_no_old_ones(pair: tuple[FarMailbox, socket.socket]) -> None:
    """Whatever is lost is lost from the front: each table comes with its depths in order, and the newest one does."""
    mailbox, target = pair
    rounds = 3000
    for round_ in range(rounds):
        for slot in (0, 1):
            stamp = Stamp(slot, 1, round_)
            for depth in range(3):
                mailbox.publish(Table(stamp, [0] * 8, [5] * 8, [[depth] * 8] * depth))
    held = sum(len(frame) for depths in mailbox._tables.values() for frame in depths)
    assert held < 2 * 3 * 200, "bounded, however much is published"
    decoder = frames.TableFrames(SHAPE)
    tables = [decoder.decode(payload) for _, payload in sent_by(target, mailbox.flush)]
    assert len(tables) < 2 * 3 * rounds, "it was slow enough to lose some"
    for slot in (0, 1):
        newest = [table for table in tables if table.stamp == Stamp(slot, 1, rounds - 1)]
        assert [len(table.drafts) for table in newest] == [0, 1, 2]
        came = [table.stamp.round for table in tables if table.stamp.slot == slot]
        assert came == sorted(came)


def test_a_target_that_reads_slowly_is_still_told_what_was_taken(pair: tuple[FarMailbox, socket.socket]) -> None:
    mailbox, target = pair
    while mailbox.flush():
        mailbox.publish(KEYS)
    target.sendall(step_frame(1))
    assert mailbox.receive() == admit(1)
    assert (Kind.TAKEN, frames.TAKEN.pack(1)) in sent_by(target, mailbox.flush)


@pytest.mark.parametrize(("may_sleep", "longest"), [(True, SLEEP_MILLISECONDS), (False, 1)])
def test_where_no_bell_is_to_be_waited_for_a_wait_is_short(may_sleep: bool, longest: int) -> None:
    waits: list[int] = []
    end = NetworkEnd.__new__(NetworkEnd)
    end.mailbox = SimpleNamespace(wait=waits.append)  # type: ignore[assignment]
    end.idle(time.perf_counter() - 10, may_sleep)
    assert waits == [longest]


def test_the_tables_of_a_process_reach_the_mailbox_of_the_other_in_full(channel: NetworkChannel) -> None:
    """More requests than one packet holds."""
    with drafting(channel.invitation, "probabilistic"):
        channel.wait_until_ready()
        for generation in range(1, 6):
            assert channel.post(admit(generation))
            table_of(channel, Stamp(1, generation, 0))
        channel.close()
