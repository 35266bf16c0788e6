"""The process placement with a child that needs no vLLM: life, death, sleep, and what is left behind (nothing)."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.shared_names import held_names
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.placement.echo_child import DRAFTS, MAX_LENGTH, C
from tests.unit.placement.parent import ROOT, SHAPE, open_channel
from tests.unit.placement.watching import becomes_idle, gone, until, waits_apart
from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.messages import Admit, Outcome, Release, Round, Sampling, Stamp, Step, Table, Work
from vllm_saguaro.placement import mailbox_channel
from vllm_saguaro.placement import process as process_module
from vllm_saguaro.placement.channel import Channel, DraftFailed
from vllm_saguaro.placement.process import ProcessChannel

PROMPT = (3, 1, 4, 1, 5, 9)
ADMIT = Step(admits=[Admit(Stamp(2, 1, 0), Sampling(), PROMPT)])


@pytest.fixture
def channel() -> Iterator[ProcessChannel]:
    opened = open_channel()
    opened.wait_until_ready()
    yield opened
    opened.close()


def finished(channel: Channel, stamp: Stamp) -> Table:
    """The finished table of a round."""

    def is_there() -> bool:
        table = channel.read(stamp.slot)
        return table is not None and table.stamp == stamp and len(table.drafts) == 3

    assert until(is_there)
    table = channel.read(stamp.slot)
    assert table is not None
    return table


def test_life_of_a_request_in_another_process() -> None:
    oracle = FakeModel(max_length=MAX_LENGTH)
    channel: Channel = open_channel("drafts", shape=dataclasses.replace(SHAPE, support=SUPPORT))
    channel.wait_until_ready()
    assert channel.alive
    assert channel.max_length == MAX_LENGTH
    assert channel.post(ADMIT)
    text = list(PROMPT)
    drafts: tuple[int, ...] = ()
    for round_ in range(3):
        table = finished(channel, Stamp(2, 1, round_))
        branch = max(range(len(table.bonus)), key=lambda i: table.accepted[i])
        text += [*drafts[: table.accepted[branch]], table.bonus[branch]]
        verified = len(drafts)
        drafts = table.speculation(branch)
        assert list(drafts) == oracle.greedy_continuation(text, 3)
        outcome = Outcome(Stamp(2, 1, round_), table.accepted[branch], table.bonus[branch], len(text), drafts, verified)
        assert channel.post(Step(outcomes=[outcome]))
    assert channel.sampling_c is None
    channel.post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(0.8), PROMPT)]))
    finished(channel, Stamp(0, 1, 0))
    assert channel.sampling_c == C
    channel.close()
    assert channel.sampling_c is None


def test_the_rounds_of_another_process_are_told_in_our_time() -> None:
    channel = open_channel("drafts", shape=dataclasses.replace(SHAPE, rounds=8))
    channel.wait_until_ready()
    before = time.perf_counter()
    channel.post(ADMIT)
    finished(channel, Stamp(2, 1, 0))
    found: list[Round] = []

    def told() -> bool:
        found.extend(channel.rounds())
        return len(found) == 2

    assert until(told)
    after = time.perf_counter()
    prompt, one = found
    assert (prompt.work, prompt.rows) == (Work.PROMPT, len(PROMPT))
    assert (one.work, one.rows, one.branches) == (Work.ROUND, 1, SHAPE.branches)
    times = [at / 1e9 for at in (prompt.began, prompt.ended, one.began, one.glued, one.forked, one.ended)]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= after
    channel.close()
    assert channel.rounds() == []


def test_nothing_is_left_in_shared_memory_and_no_descriptor_stays_open() -> None:
    names, descriptors = held_names(), len(os.listdir("/proc/self/fd"))
    opened = open_channel()
    opened.wait_until_ready()
    assert held_names() <= names
    opened.close()
    opened.close()
    assert gone(opened.pid)
    assert not opened.alive
    assert not opened.post(ADMIT)
    assert opened.read(2) is None
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_memory_is_open_to_its_user_alone_and_neither_side_can_make_it_smaller(channel: ProcessChannel) -> None:
    assert stat.S_IMODE(os.fstat(channel._memory_fd).st_mode) == 0o600
    for pid in ("self", channel.pid):
        with open(f"/proc/{pid}/fd/{channel._memory_fd}", "r+b") as memory, pytest.raises(PermissionError):
            memory.truncate(8)


def test_a_killed_child_is_noticed_and_nothing_is_taken_from_it(channel: ProcessChannel) -> None:
    channel.post(ADMIT)
    assert finished(channel, Stamp(2, 1, 0)).speculation(0) == DRAFTS
    os.kill(channel.pid, signal.SIGKILL)
    assert until(lambda: not channel.alive)
    assert not channel.post(ADMIT)
    assert channel.read(2) is None
    channel.close()


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent process, and the pid of its draft process."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.placement.parent"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    child = int(running.stdout.readline())
    yield running, child
    running.kill()
    running.communicate()


def test_the_child_ends_with_a_parent_that_is_killed(parent: tuple[subprocess.Popen[str], int]) -> None:
    running, child = parent
    assert not gone(child)
    running.kill()
    assert until(lambda: gone(child), seconds=2.0)


def test_the_child_ends_with_a_parent_that_closes_nothing(parent: tuple[subprocess.Popen[str], int]) -> None:
    running, child = parent
    running.communicate("go\n", timeout=60)
    assert running.returncode == 0
    assert until(lambda: gone(child), seconds=2.0)


def test_an_idle_child_uses_hardly_any_time(channel: ProcessChannel) -> None:
    assert becomes_idle(channel.pid)


def test_a_sleeping_child_wakes_for_a_step(channel: ProcessChannel) -> None:
    waited = []
    for generation in (1, 2, 3):
        assert until(lambda: channel._mailbox.asleep)
        posted = time.perf_counter()
        assert channel.post(Step(admits=[Admit(Stamp(2, generation, 0), Sampling(), PROMPT)]))
        finished(channel, Stamp(2, generation, 0))
        waited.append(time.perf_counter() - posted)
    assert min(waited) < 0.5  # woken, and not found by the look once a second


def test_a_child_whose_descriptors_have_high_numbers_sleeps_and_wakes() -> None:
    """As in a server with a thousand connections: `select` takes no number above 1023."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1100:
        pytest.skip("this system allows too few descriptors")
    others = [os.dup(0) for _ in range(1030)]
    opened = open_channel()
    for fd in others:
        os.close(fd)
    opened.wait_until_ready()
    assert until(lambda: opened._mailbox.asleep)
    assert opened.post(ADMIT)
    finished(opened, Stamp(2, 1, 0))
    opened.close()


def test_a_child_that_dies_while_it_starts_is_a_failed_draft() -> None:
    opened = open_channel("dies")
    with pytest.raises(DraftFailed, match="exit status 3"):
        opened.wait_until_ready()
    assert not opened.alive
    opened.close()


def test_a_child_that_says_so_is_a_failed_draft() -> None:
    opened = open_channel("fails")
    with pytest.raises(DraftFailed, match="load"):
        opened.wait_until_ready()
    opened.close()


def test_a_child_that_cannot_be_imported_is_a_failed_draft() -> None:
    with pytest.raises(DraftFailed):
        open_channel(module="tests.unit.placement.no_such_module").wait_until_ready()


def test_a_child_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_channel, "START_TIMEOUT_SECONDS", 0.05)
    opened = open_channel()
    with pytest.raises(DraftFailed, match="not ready"):
        opened.wait_until_ready()
    opened.close()
    assert gone(opened.pid)


@pytest.mark.parametrize("how", ["does not listen", "is stopped"])
def test_a_child_that_could_not_end_in_order_is_gone_at_once(how: str) -> None:
    opened = open_channel("deaf" if how == "does not listen" else "echo")
    opened.wait_until_ready()
    if how == "is stopped":
        os.kill(opened.pid, signal.SIGSTOP)
    begun = time.monotonic()
    opened.close()
    assert time.monotonic() - begun < process_module._END_TIMEOUT_SECONDS
    assert gone(opened.pid)


def test_the_end_of_a_child_is_the_end_of_its_epoch(channel: ProcessChannel) -> None:
    assert list(channel.shards) == [range(4)]
    assert channel.epoch(0) == channel.epoch(3) > 0
    os.kill(channel.pid, signal.SIGKILL)
    assert until(lambda: channel.epoch(0) == 0)
    assert channel.stalled_seconds == 0.0


def test_a_stopped_child_lets_its_oldest_step_wait(channel: ProcessChannel) -> None:
    channel.post(ADMIT)
    finished(channel, Stamp(2, 1, 0))
    assert until(lambda: channel.stalled_seconds == 0.0)
    os.kill(channel.pid, signal.SIGSTOP)
    for _ in range(2):
        channel.post(Step(releases=[Release(Stamp(2, 1, 0))]))
    assert until(lambda: channel.stalled_seconds > 0.1)
    os.kill(channel.pid, signal.SIGCONT)
    assert until(lambda: channel.stalled_seconds == 0.0)


def test_one_that_is_closed_while_it_starts_tells_who_waits_for_it() -> None:
    opened = open_channel("sleeps")
    waiting, said = waits_apart(opened)
    time.sleep(0.05)
    opened.close()
    waiting.join(60)
    assert len(said) == 1
    assert "while it started" in said[0]
    assert gone(opened.pid)


def test_two_draft_processes_live_side_by_side_and_end_apart(channel: ProcessChannel) -> None:
    second = open_channel()
    second.wait_until_ready()
    second.close()
    assert channel.alive
    channel.post(ADMIT)
    finished(channel, Stamp(2, 1, 0))
    channel.close()
    assert gone(channel.pid)


def test_the_first_of_two_draft_processes_ends_when_closed_though_the_second_lives(channel: ProcessChannel) -> None:
    """The second child must not hold the first one's pipe open."""
    second = open_channel()
    second.wait_until_ready()
    begun = time.monotonic()
    channel.close()
    assert time.monotonic() - begun < 2.0
    second.close()
