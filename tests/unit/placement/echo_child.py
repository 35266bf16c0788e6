"""A draft side without vLLM, in a process: the real `ProcessEnd`, and by option `role` behind it

`echo`     nothing heavy: a table of one branch for each request that is admitted
`drafts`   the real `serve` and `DraftLoop` over the fake model
`dies`, `fails`    trouble while it starts
`sleeps`   never comes up
`hungry`   as `echo`, but it wants a lot of memory for each admission
`deaf`     as `echo`, but it does not end with its parent's pipe
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from vllm_saguaro.messages import Step, Table
from vllm_saguaro.placement.mailbox import DraftState, Mailbox
from vllm_saguaro.placement.process import ProcessEnd

MAX_LENGTH = 48
DRAFTS = (7, 8, 9)
C = 0.1


def echo(mailbox: Mailbox) -> tuple[Callable[[Step], None], Callable[[], bool]]:
    """Answers each admission at once."""

    def submit(step: Step) -> None:
        for admit in step.admits:
            for depth in range(len(DRAFTS) + 1):
                rows = [[token] for token in DRAFTS[:depth]]
                mailbox.publish(Table(admit.stamp, [0], [admit.token_ids[-1]], rows))

    return submit, lambda: False


def hungry(mailbox: Mailbox) -> tuple[Callable[[Step], None], Callable[[], bool]]:
    """Answers each admission as soon as it has the memory."""
    answer, advance = echo(mailbox)

    def submit(step: Step) -> None:
        bytearray(64 << 20)
        answer(step)

    return submit, advance


def drafts(end: ProcessEnd) -> NoReturn:
    """The draft side as it is, but for the model."""
    from tests.unit.drafting.checks import make_engine
    from tests.unit.drafting.fake_model import FakeModel
    from vllm_saguaro.drafting.deflations import Deflations
    from vllm_saguaro.drafting.loop import DraftLoop
    from vllm_saguaro.vllm_hooks.draft_process import serve

    shape = end.mailbox.shape
    model = FakeModel(max_length=MAX_LENGTH, num_blocks=256)
    deflations = Deflations(shape.num_speculative_tokens, C)
    engine = make_engine(
        model, shape.num_speculative_tokens, shape.branches, method="probabilistic", deflations=deflations
    )
    end.mailbox.announce(DraftState.READY, MAX_LENGTH)
    serve(end, DraftLoop(engine, end.mailbox.publish, end.mailbox.note))


def main() -> None:
    end = ProcessEnd(json.loads(sys.stdin.buffer.readline()))
    role = end.options["role"]
    if role == "dies":
        os._exit(3)
    if role == "sleeps":
        end.end_with_parent()
        time.sleep(3600)
    if role == "fails":
        end.mailbox.announce(DraftState.FAILED)
        raise SystemExit(1)
    if role != "deaf":
        end.end_with_parent()
    if role == "drafts":
        drafts(end)
    submit, advance = {"hungry": hungry}.get(role, echo)(end.mailbox)
    end.mailbox.announce(DraftState.READY, MAX_LENGTH)
    busy_at = time.perf_counter()
    while True:
        step = end.mailbox.receive()
        if step is not None:
            submit(step)
        elif not advance():
            end.idle(busy_at)
            continue
        busy_at = time.perf_counter()


if __name__ == "__main__":
    main()
