"""Opens a channel to the test child. As a program, `python -m tests.unit.placement.parent`, a parent with such a child.

It prints the child's pid when that is ready, and exits without closing anything as soon as a line comes in on its
standard input, unless it is killed before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.placement.process import ProcessChannel

ROOT = Path(__file__).resolve().parents[3]
SHAPE = MailboxShape(slots=4, branches=5, num_speculative_tokens=3, ring_bytes=1 << 16, support=8)


def open_channel(
    role: str = "echo", module: str = "tests.unit.placement.echo_child", shape: MailboxShape = SHAPE
) -> ProcessChannel:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return ProcessChannel(module, {"role": role}, shape, environment)


if __name__ == "__main__":
    channel = open_channel()
    channel.wait_until_ready()
    print(channel.pid, flush=True)
    sys.stdin.readline()
