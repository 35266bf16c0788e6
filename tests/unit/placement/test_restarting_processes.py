"""Restarts of real processes under real signals, with a child that needs no vLLM; nothing is left of any of them."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.placement.parent import open_channel
from tests.unit.placement.test_process import ADMIT, finished
from tests.unit.placement.watching import gone, until
from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Stamp
from vllm_saguaro.placement.process import ProcessChannel
from vllm_saguaro.placement.restarting import Care, RestartingChannel

CARE = Care(look_every=0.01, first_back_off=0.05, hang=0.5, longest_hang=0.5)


class Household:
    """Draft processes one after the other, each with the role that is its turn; the last role is that of all others."""

    def __init__(self, *roles: str, restarts: int = 5) -> None:
        self._roles = list(roles)
        self.processes: list[ProcessChannel] = []
        self.page = CounterPage()
        log = logging.getLogger("saguaro-test")
        self.channel = RestartingChannel(self._start, restarts, self.page, log, CARE)
        self.channel.wait_until_ready()

    def _start(self) -> ProcessChannel:
        role = self._roles.pop(0) if len(self._roles) > 1 else self._roles[0]
        self.processes.append(open_channel(role))
        return self.processes[-1]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def works(self) -> bool:
        """The present life answers."""
        self.channel.post(ADMIT)
        return finished(self.channel, Stamp(2, 1, 0)).speculation(0) != ()


def mapped_mailboxes() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:saguaro-mailbox")


@pytest.fixture
def home() -> Iterator[Callable[..., Household]]:
    """Makes households. When they are closed no process, descriptor or mapped memory of theirs may be left."""
    made: list[Household] = []
    descriptors, mailboxes = len(os.listdir("/proc/self/fd")), mapped_mailboxes()

    def make(*roles: str, restarts: int = 5) -> Household:
        made.append(Household(*roles, restarts=restarts))
        return made[-1]

    yield make
    for household in made:
        household.channel.close()
        assert all(gone(pid) for pid in household.pids), "a draft process is left"
    assert mapped_mailboxes() == mailboxes, "the memory of a mailbox is left"
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a descriptor is left"


def out_of_memory(pid: int) -> None:
    """No more memory than it has: the next larger piece that it asks for ends it."""
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))


FAULTS: dict[str, Callable[[int], None]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "aborts": lambda pid: os.kill(pid, signal.SIGABRT),
    "stopped": lambda pid: os.kill(pid, signal.SIGSTOP),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_process_takes_the_place_of_one_that_is_gone_or_hangs(
    home: Callable[..., Household], fault: str
) -> None:
    here = home("echo")
    assert here.works()
    before = here.channel.epoch(2)
    FAULTS[fault](here.pids[0])
    here.channel.post(ADMIT)  # a stopped one lets it wait
    assert until(lambda: here.channel.epoch(2) not in (0, before), seconds=60)
    assert gone(here.pids[0])
    assert len(here.pids) == 2
    assert here.works()
    assert here.page.value(counters.DRAFT_RESTARTS) == here.page.value(counters.DRAFT_UP) == 1


def test_a_process_that_runs_out_of_memory_is_followed_by_one_that_has_some(home: Callable[..., Household]) -> None:
    here = home("hungry", "echo")
    out_of_memory(here.pids[0])
    before = here.channel.epoch(2)
    here.channel.post(ADMIT)
    assert until(lambda: here.channel.epoch(2) not in (0, before), seconds=60)
    assert here.works()


def test_one_that_dies_at_every_start_is_left_off(home: Callable[..., Household]) -> None:
    here = home("echo", "dies", restarts=2)
    os.kill(here.pids[0], signal.SIGKILL)
    assert until(lambda: here.page.value(counters.DRAFT_LEFT_OFF) == 1, seconds=60)
    assert len(here.pids) == 3
    assert here.page.value(counters.DRAFT_RESTARTS) == 2
    assert here.page.value(counters.DRAFT_UP) == 0
    assert not here.channel.post(ADMIT)
    assert all(gone(pid) for pid in here.pids)


def test_close_does_not_wait_for_one_that_starts(home: Callable[..., Household]) -> None:
    here = home("echo", "sleeps")
    os.kill(here.pids[0], signal.SIGKILL)
    assert until(lambda: len(here.pids) == 2 and not gone(here.pids[1]), seconds=60)
    here.channel.close()
    assert gone(here.pids[1])


def test_close_ends_one_that_is_stopped(home: Callable[..., Household]) -> None:
    here = home("echo")
    os.kill(here.pids[0], signal.SIGSTOP)
    here.channel.close()
    assert gone(here.pids[0])
