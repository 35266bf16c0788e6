"""Two processes at one mailbox, neither ever waiting for the other: nothing is torn, lost or doubled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.placement.hammer import SHAPE, SLOT, attach, checked_q, is_anew, step_of, table_of

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 2.0


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = os.memfd_create("saguaro-test")
    os.ftruncate(fd, SHAPE.total_bytes)
    yield fd
    os.close(fd)


def start(role: str, memory_fd: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.placement.hammer", role, str(memory_fd), str(SECONDS)],
        cwd=ROOT,
        pass_fds=(memory_fd,),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_table_is_never_seen_torn(memory_fd: int) -> None:
    box = attach(memory_fd)
    reads = partial = 0
    newest = -1
    with start("tables", memory_fd) as writer:
        while writer.poll() is None:
            table = box.read(SLOT)
            if table is None or table.stamp.generation == 0:
                continue
            expected = table_of(table.stamp.round, len(table.drafts), is_anew(table))
            assert (table.stamp, table.accepted, table.bonus, table.drafts) == (
                expected.stamp,
                expected.accepted,
                expected.bonus,
                expected.drafts,
            )
            assert table.stamp.round >= newest
            newest = table.stamp.round
            reads += 1
            partial += len(table.drafts) < SHAPE.num_speculative_tokens
        assert writer.stdout is not None
        rounds = int(writer.stdout.read())
    assert writer.returncode == 0
    assert min(rounds, reads) > 100
    assert partial > 0, "the reader never came in between: nothing was tested"


def test_a_table_is_never_seen_with_garbage_in_it(memory_fd: int) -> None:
    """The writer writes over each of its tables what no table can be, with and without the lock."""
    box = attach(memory_fd)
    seen = nothing = 0
    with start("garbage", memory_fd) as writer:
        while writer.poll() is None:
            table = box.read(SLOT)
            if table is None:
                nothing += 1
                continue
            if table.stamp.generation == 0:
                continue
            expected = table_of(table.stamp.round, len(table.drafts))
            assert (table.stamp, table.accepted, table.bonus, table.drafts) == (
                expected.stamp,
                expected.accepted,
                expected.bonus,
                expected.drafts,
            )
            for branch in range(len(table.bonus)):
                box.proposals(table.stamp, table.version, branch, len(table.drafts))
            seen += 1
        assert writer.stdout is not None
        rounds = int(writer.stdout.read())
    assert writer.returncode == 0
    assert min(rounds, seen) > 100
    assert nothing > 100, "the reader never met garbage: nothing was tested"


def test_a_q_is_never_seen_torn(memory_fd: int) -> None:
    """It is read while the writer is rounds ahead: then it is not there, and never another table's."""
    box = attach(memory_fd)
    seen = missing = 0
    with start("tables", memory_fd) as writer:
        while writer.poll() is None:
            table = box.read(SLOT)
            if table is None or table.stamp.generation == 0 or not table.drafts:
                continue
            found = checked_q(box, table)
            seen += found
            missing += len(table.bonus) - found
    assert writer.returncode == 0
    assert seen > 100
    assert missing > 0, "the writer never came in between: nothing was tested"


def test_no_step_is_lost_or_torn(memory_fd: int) -> None:
    box = attach(memory_fd)
    posted = refused = 0
    with start("steps", memory_fd) as reader:
        while not box.asleep and reader.poll() is None:
            pass
        while reader.poll() is None:
            if box.post(step_of(posted)):
                posted += 1
            else:
                refused += 1
        assert reader.stdout is not None
        received = int(reader.stdout.read())
    assert reader.returncode == 0
    assert received > 100
    assert refused > 0, "the ring was never full: nothing was tested"
    assert received <= posted
    rest = 0
    while (step := box.receive()) is not None:
        assert step == step_of(received + rest)
        rest += 1
    assert received + rest == posted
