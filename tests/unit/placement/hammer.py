"""A second process at a mailbox: `python -m tests.unit.placement.hammer ROLE FD SECONDS`.

`tables` publishes as fast as it can, each table's content derived from its stamp. `garbage` does so too, and writes
over each table what no table can be. `steps` receives as fast as it can and checks that nothing is lost, doubled or
torn. It answers with one line on standard output.
"""

from __future__ import annotations

import array
import mmap
import sys
import time

import numpy as np

from vllm_saguaro.messages import Admit, Outcome, Proposals, Sampling, Stamp, Step, Table, Want
from vllm_saguaro.placement.layout import CELL_HEADER, CONTROL_WORDS, MailboxShape
from vllm_saguaro.placement.mailbox import Mailbox

SHAPE = MailboxShape(slots=2, branches=8, num_speculative_tokens=3, ring_bytes=2048, support=4, vocab_size=200_007)
SLOT = 1


def table_of(round_: int, depth: int, anew: int = 0) -> Table:
    """The table of a round: its width, its keys, its drafts and their q all follow from the round.

    `anew`: 1 for the second table of the same stamp, which has other keys, drafts and q.
    """
    width = 1 + round_ % SHAPE.branches
    drafts = [[(round_ * 7 + 100 * d + i + anew) % 100_003 for i in range(width)] for d in range(depth)]
    keys = [2 * ((round_ * 3 + i) % 100_003) + anew for i in range(width)]
    accepted = [(round_ + i) % 4 for i in range(width)]
    newest = q_of(round_, depth, anew) if depth and not certain(round_) else None
    return Table(Stamp(SLOT, round_ + 1, round_), accepted, keys, drafts, newest=newest)


def is_anew(table: Table) -> int:
    """Whether this is the second table of its stamp."""
    return table.bonus[0] % 2


def certain(round_: int) -> bool:
    """Whether the drafts of a round have no q."""
    return round_ % 3 == 2


def q_of(round_: int, depth: int, anew: int) -> Proposals:
    """The q of the drafts at a depth (from 1), as wide as it is written: beyond its own width it is 0."""
    branches, width = 1 + round_ % SHAPE.branches, 1 + round_ % SHAPE.support
    numbers = np.arange(branches * width).reshape(branches, width) + 1000 * depth + 10 * round_ + 5 * anew
    weights = 1 + numbers % 8191
    probabilities = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return Proposals((numbers % 100_003).astype(np.int32), probabilities)


def checked_q(box: Mailbox, table: Table) -> int:
    """Read back the q of all branches of a table; how many were there, each of them as it should be."""
    stamp, seen = table.stamp, 0
    for branch in range(len(table.bonus)):
        found = box.proposals(stamp, table.version, branch, len(table.drafts))
        if found is None:
            continue
        assert not certain(stamp.round), "a q of drafts that have none"
        for d in range(len(table.drafts)):
            expected = q_of(stamp.round, d + 1, is_anew(table))
            width = expected.tokens.shape[1]
            assert np.array_equal(found.tokens[d, :width], expected.tokens[branch])
            assert np.array_equal(found.probabilities[d, :width], expected.probabilities[branch])
            assert not found.probabilities[d, width:].any()
        seen += 1
    return seen


def step_of(number: int) -> Step:
    """The step of a number: its size and its content follow from it."""
    tokens = tuple((number + i) % 50_021 for i in range(number % 97))
    return Step(
        [Admit(Stamp(0, 1, number), Sampling(0.5, seed=number), tokens)],
        [Want(Stamp(1, 1, number), 0, number % 5, 2)] * (number % 2),
        [Outcome(Stamp(1, 1, number), 0, number % 7, 3, tokens[:3], 0)],
    )


def attach(memory_fd: int) -> Mailbox:
    """The mailbox in this memory."""
    return Mailbox(memoryview(mmap.mmap(memory_fd, SHAPE.total_bytes)), SHAPE)


def publish_tables(box: Mailbox, seconds: float) -> int:
    end, round_ = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for anew in range(1 + round_ % 2):
            for depth in range(SHAPE.num_speculative_tokens + 1):
                box.publish(table_of(round_, depth, anew))
        round_ += 1
    return round_


def publish_garbage(box: Mailbox, seconds: float) -> int:
    """A table, then over it: all words at random, the sequence too; tokens that are none, in a table that looks sound
    and is locked while they are written; the same without the lock."""
    cell, keys = CONTROL_WORDS + SLOT * SHAPE.cell_words, CELL_HEADER
    size, chance = SHAPE.cell_words, np.random.default_rng(1)
    end, round_ = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for depth in range(SHAPE.num_speculative_tokens + 1):
            box.publish(table_of(round_, depth))
        words = chance.integers(-(2**63), 2**63, size)
        if round_ % 3:
            words[keys:] = np.where(words[keys:] > 0, words[keys:] | 1 << 31, SHAPE.vocab_size + words[keys:] % 1000)
            box._words[cell] += round_ % 3 == 1
            box._words[cell + keys : cell + size] = array.array("q", words[keys:].tolist())
            box._words[cell] += round_ % 3 == 1
        else:
            box._words[cell : cell + size] = array.array("q", words.tolist())
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
    work = {"tables": publish_tables, "garbage": publish_garbage, "steps": receive_steps}[sys.argv[1]]
    mailbox = attach(int(sys.argv[2]))
    mailbox.fall_asleep(True)  # says that it has begun
    print(work(mailbox, float(sys.argv[3])))
