"""A second process at a mailbox: `python -m tests.unit.placement.hammer ROLE FD SECONDS`.

`tables` publishes as fast as it can, each table's content derived from its stamp. `steps` receives as fast as it can
and checks that nothing is lost, doubled or torn. It answers with one line on standard output.
"""

from __future__ import annotations

import mmap
import sys
import time

from vllm_saguaro.messages import Admit, Outcome, Stamp, Step, Table
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape

SHAPE = MailboxShape(slots=2, branches=8, num_speculative_tokens=3, ring_bytes=2048)
SLOT = 1


def table_of(round_: int, depth: int) -> Table:
    """The table of a round: its width, its keys and its drafts all follow from the round."""
    width = 1 + round_ % SHAPE.branches
    drafts = [[(round_ * 7 + 100 * d + i) % 100_003 for i in range(width)] for d in range(depth)]
    keys = [(round_ * 3 + i) % 100_003 for i in range(width)]
    return Table(Stamp(SLOT, round_ + 1, round_), [(round_ + i) % 4 for i in range(width)], keys, drafts)


def step_of(number: int) -> Step:
    """The step of a number: its size and its content follow from it."""
    tokens = tuple((number + i) % 50_021 for i in range(number % 97))
    return Step([Admit(Stamp(0, 1, number), 0.5, tokens)], [Outcome(Stamp(1, 1, number), 0, number % 7, 3, tokens[:3])])


def attach(memory_fd: int) -> Mailbox:
    """The mailbox in this memory."""
    return Mailbox(memoryview(mmap.mmap(memory_fd, SHAPE.total_bytes)), SHAPE)


def publish_tables(box: Mailbox, seconds: float) -> int:
    end, round_ = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for depth in range(SHAPE.num_speculative_tokens + 1):
            box.publish(table_of(round_, depth))
        round_ += 1
    return round_


def receive_steps(box: Mailbox, seconds: float) -> int:
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        step = box.receive()
        if step is not None:
            assert step == step_of(number), f"step {number} is not what was posted"
            number += 1
            if number % 200 == 0:
                time.sleep(1e-3)  # lets the ring fill up now and then
    assert box.dropped == 0
    return number


if __name__ == "__main__":
    work = {"tables": publish_tables, "steps": receive_steps}[sys.argv[1]]
    mailbox = attach(int(sys.argv[2]))
    mailbox.fall_asleep(True)  # says that it has begun
    print(work(mailbox, float(sys.argv[3])))
