"""A draft side that comes with an invitation: the real loop over the fake model.

In a thread of the test; in a Ray actor, which calls `serve_invited`; or as a process of its own,
`python -m tests.unit.placement.far_draft`, which reads the invitation as one line of JSON. It ends when the target side
has gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.kv import Blocks
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.placement.admission import Ask
from vllm_saguaro.placement.arrival import come
from vllm_saguaro.placement.draft_end import TargetGone
from vllm_saguaro.placement.mailbox import DraftState, MailboxShape
from vllm_saguaro.placement.meeting import Invitation
from vllm_saguaro.placement.pool import DraftPool

MAX_LENGTH = 200
VOCABULARY = 40
C = 0.7
SHAPE = MailboxShape(
    slots=3, branches=8, num_speculative_tokens=4, ring_bytes=1 << 16, support=64, vocab_size=VOCABULARY
)


def model() -> FakeModel:
    return FakeModel(num_blocks=512, max_length=MAX_LENGTH, vocab_size=VOCABULARY)


def draft(invitation: Invitation, method: str = "coupled") -> None:
    """Until the target side has gone."""
    end = come(invitation)
    shape = invitation.shape
    deflations = Deflations(shape.num_speculative_tokens, C)
    engine = make_engine(model(), shape.num_speculative_tokens, shape.branches, method=method, deflations=deflations)
    with contextlib.closing(end), contextlib.suppress(TargetGone):
        loop = DraftLoop(engine, end.mailbox.publish)
        end.mailbox.announce(DraftState.READY, MAX_LENGTH)
        busy_at = time.perf_counter()
        while True:
            step = end.mailbox.receive()
            if step is not None:
                loop.submit(step)
            elif (rests := loop.rests) or not loop.advance():
                end.idle(busy_at, may_sleep=not rests)
                continue
            busy_at = time.perf_counter()


def serve_invited(start: Mapping[str, Any]) -> str:
    """As `vllm_hooks.draft_process.serve_invited`. Option `role`: "fails" while it starts; `told`: a file for what it
    was told."""
    options = start["options"]
    if "told" in options:
        import ray

        told = {"cpus": start["cpus"], "threads": start["threads"], "environment": dict(os.environ)}
        told["namespace"] = ray.get_runtime_context().namespace
        told["niceness"] = os.getpriority(os.PRIO_PROCESS, 0)
        Path(options["told"]).write_text(json.dumps(told))
    if options.get("role") == "fails":
        raise RuntimeError("this draft cannot be loaded")
    draft(Invitation.from_dict(start["invitation"]))
    return "the target side hung up"


def open_pool(start: Mapping[str, Any]) -> DraftPool:
    """As `vllm_hooks.draft_process.open_pool`. Option `role`: "fails" while it loads, "slow" to load. `loads_until`: a
    file; it loads as long as that is not there.
    """
    first = Ask(**start["ask"])
    role = first.options.get("role")
    if role == "fails":
        raise RuntimeError("this draft cannot be loaded")
    if role == "slow":
        time.sleep(2)
    while "loads_until" in first.options and not Path(first.options["loads_until"]).exists():
        time.sleep(0.1)
    of = model()

    def make(ask: Ask, blocks: Blocks) -> DraftEngine:
        return make_engine(of, SHAPE.num_speculative_tokens, SHAPE.branches, pool=blocks)

    return DraftPool(of, make, first, start["engines"], logging.getLogger("test"), start["linger"])


@contextlib.contextmanager
def drafting(invitation: Invitation, method: str = "coupled") -> Iterator[threading.Thread]:
    """A draft side in a thread, which has ended when this ends: close the channel before."""
    thread = threading.Thread(target=draft, args=(invitation, method), daemon=True)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()


if __name__ == "__main__":
    draft(Invitation.from_dict(json.loads(sys.stdin.readline())))
