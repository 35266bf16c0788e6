"""`MailboxDraft` with a real draft process: shared memory, a loop of its own, death and restart."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.unit.placement.device_sides import CPU, SmallTarget
from tests.unit.placement.parent import ROOT
from tests.unit.placement.watching import until
from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.messages import Stamp
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.process import ProcessChannel
from vllm_saguaro.placement.restarting import Care, RestartingChannel

SHAPE = MailboxShape(
    slots=4, branches=5, num_speculative_tokens=3, ring_bytes=1 << 16, support=8, vocab_size=40, device_steps=16
)
LOG = logging.getLogger("test")
CARE = Care(look_every=0.02, first_back_off=0.05, longest_back_off=0.1, hang=0.6, longest_hang=0.6)
PROMPT = [3, 1, 4, 1, 5, 9]


class Real:
    """A small target with a draft process that is started again."""

    def __init__(self) -> None:
        self.page = CounterPage()
        self.processes: list[ProcessChannel] = []
        self.channel = RestartingChannel(self._start, 9, self.page, LOG, CARE)
        self.draft = MailboxDraft(self.channel, SHAPE, CPU, TWINS, LOG)
        self.draft.wait_until_ready()
        self.target = SmallTarget(self.draft)

    def _start(self) -> ProcessChannel:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        role = {"role": "drafts"}
        self.processes.append(ProcessChannel("tests.unit.placement.echo_child", role, SHAPE, environment))
        return self.processes[-1]

    def has_table(self, slot: int) -> bool:
        """Whether the finished table of the round that the slot is in is there."""
        generation, round_, _ = self.draft._step.state[slot].tolist()
        table = self.channel.read(slot)
        return table is not None and table.stamp == Stamp(slot, generation, round_) and len(table.drafts) == 3

    def hits(self, slot: int, rounds: int = 6) -> int:
        """Of so many rounds, each with as much time for the draft side as it needs."""
        before = self.target.hits
        for _ in range(rounds):
            assert until(lambda: self.has_table(slot))
            self.target.step([slot])
        return self.target.hits - before


@pytest.fixture
def real() -> Iterator[Real]:
    both = Real()
    yield both
    both.draft.close()


def test_a_draft_process_serves_a_target_whose_outcomes_stay_on_the_device(real: Real) -> None:
    hits = 0
    for request in range(8):
        real.target.admit(request % 4, [request, *PROMPT], f"q{request}")
        hits += real.hits(request % 4)
        real.target.release(request % 4, f"q{request}")
    assert hits > 24, "of 48 rounds"
    assert dropped(real.processes[0]) == 0


def test_a_draft_that_was_asleep_wakes_for_an_admission_and_stays_awake_for_records(real: Real) -> None:
    process = real.processes[0]
    assert until(lambda: process._mailbox.asleep)
    real.target.admit(0, PROMPT)
    assert until(lambda: not process._mailbox.asleep)
    time.sleep(0.2)  # longer than it would wait awake for the bell
    assert not process._mailbox.asleep
    assert real.hits(0)
    real.target.release(0)
    assert until(lambda: process._mailbox.asleep)


def test_a_killed_draft_costs_drafts_and_the_next_one_has_those_that_come(real: Real) -> None:
    real.target.admit(0, PROMPT)
    assert real.hits(0)
    os.kill(real.processes[0].pid, signal.SIGKILL)
    assert until(lambda: not real.processes[0].alive)
    for _ in range(3):
        assert real.target.step([0]).ready.tolist() == [0]
    assert until(lambda: real.channel.epoch(0) != 0 and len(real.processes) == 2)
    real.target.admit(1, PROMPT[1:])
    assert real.hits(1)
    assert real.target.step([0]).ready.tolist() == [0]
    assert real.page.value(counters.DRAFT_RESTARTS) == 1


def test_a_draft_that_hangs_is_noticed_by_the_records_that_it_does_not_take(real: Real) -> None:
    real.target.admit(0, PROMPT)
    assert real.hits(0)
    os.kill(real.processes[0].pid, signal.SIGSTOP)
    for _ in range(100):
        if len(real.processes) > 1:
            break
        real.target.step([0])
        real.target.texts[0] = real.target.texts[0][:20]  # its text is of no interest any more
        time.sleep(0.05)
    assert len(real.processes) > 1


def test_the_memory_of_a_life_goes_with_it(real: Real) -> None:
    maps = lambda: sum("saguaro-mailbox" in line for line in open("/proc/self/maps"))  # noqa: E731, SIM115
    assert maps() == 1
    for life in (1, 2):
        os.kill(real.processes[-1].pid, signal.SIGKILL)
        assert until(lambda life=life: real.channel.epoch(0) != 0 and len(real.processes) == life + 1)  # type: ignore[misc]
        real.target.admit(0, PROMPT)
        real.target.step([0])
        real.target.step([0])
        assert maps() == 1
    real.draft.close()
    assert maps() == 0


def dropped(process: ProcessChannel) -> int:
    return process._mailbox.dropped
