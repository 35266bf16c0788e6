"""The draft side in a process of its own: `python -m vllm_saguaro.vllm_hooks.draft_process`, started by
`placement/process.py`, or one that Ray started, whose actor calls `serve_invited`.

Nothing heavy is imported before the process is on its own cores: torch sizes its thread pools from them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_saguaro import cores

if TYPE_CHECKING:
    from vllm_saguaro.drafting.engine import DraftEngine
    from vllm_saguaro.drafting.loop import DraftLoop
    from vllm_saguaro.placement.draft_end import DraftEnd


_TELL_AFTER = 2048
"""Outcomes after which the log has what was learnt."""


def main() -> None:
    """Load the draft, say so, then keep tables ready until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us in order
    start = json.loads(sys.stdin.buffer.readline())
    options: dict[str, Any] = start["options"]
    if options["cpus"]:
        cores.pin(options["cpus"])

    from vllm_saguaro.placement.process import DraftEnd

    end = DraftEnd(start)
    end.end_with_parent()
    load_and_serve(end, options)


def serve_invited(start: Mapping[str, Any]) -> str:
    """Draft for the target side that sent an invitation, until that has gone; how that came about.

    `start`: `invitation`, `options`, `cpus` (cores of this machine to stay on, or none), `threads`. Raises what loading
    raises, after having told the target side.
    """
    cpus: list[int] = start["cpus"]
    if cpus:
        cores.pin(cpus)
    # Whoever started this process may have bound or counted its threads for something else.
    environment = cores.draft_environment(dict(os.environ), range(start["threads"]))
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)

    from vllm_saguaro.placement.draft_end import TargetGone
    from vllm_saguaro.placement.meeting import Invitation
    from vllm_saguaro.placement.network_end import NetworkEnd
    from vllm_saguaro.placement.passed_memory import PassedMemoryEnd

    invitation = Invitation.from_dict(start["invitation"])
    end = NetworkEnd(invitation) if invitation.port else PassedMemoryEnd(invitation)
    with contextlib.closing(end):
        try:
            load_and_serve(end, start["options"])
        except TargetGone as gone:
            return str(gone)


def load_and_serve(end: DraftEnd, options: dict[str, Any]) -> NoReturn:
    """Load the draft, say so, then keep tables ready. It ends with an exception, `TargetGone` in good order."""
    from vllm_saguaro.drafting.loop import DraftLoop
    from vllm_saguaro.placement.mailbox import DraftState

    try:
        engine = load_engine(options)
    except BaseException:
        end.mailbox.announce(DraftState.FAILED)
        raise
    gc.freeze()  # what is loaded now lives as long as the process: no collection need look at it again
    end.mailbox.announce(DraftState.READY, engine.model.max_length)
    serve(end, DraftLoop(engine, end.mailbox.publish))


def load_engine(options: dict[str, Any]) -> DraftEngine:
    """The engine that `options` describe: those of `DraftModelConfig` under "model", what it drafts beside it."""
    from vllm_saguaro.drafting.deflations import Deflations
    from vllm_saguaro.drafting.engine import DraftEngine
    from vllm_saguaro.drafting.pace import Pace
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel

    model = VllmDraftModel(DraftModelConfig(**options["model"]))
    branches = options["branches"]
    model.warm_up(rows=(branches,))
    return DraftEngine(
        model,
        options["num_speculative_tokens"],
        branches,
        options["fan_out"],
        options["draft_sample_method"],
        pace=Pace(options["num_speculative_tokens"], branches, options["choose_branches"]),
        deflations=Deflations(options["num_speculative_tokens"], options["sampling_c"]),
    )


def tell(engine: DraftEngine) -> None:
    """Say once what was learnt: how far the predictions were off, and C."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.vllm_saguaro.draft")
    for name, events in engine.forecaster.calibration.summary().items():
        errors = ", ".join(f"{what} {found['error']:.3f}" for what, found in events.items())
        logger.info("Saguaro: calibration error of the predicted outcomes (%s): %s.", name, errors)
    logger.info("Saguaro: C of Saguaro sampling would be %.1f now.", engine.deflations.best(engine.pace.round_time))


def tell_dropped(steps: int) -> None:
    """Say that steps came that are none: memory or a link that is damaged, or two versions of this package."""
    from vllm.logger import init_logger

    init_logger("vllm.vllm_saguaro.draft").warning(
        "Saguaro: the draft side dropped what was no step (%d so far); those requests are told to it anew.", steps
    )


def serve(end: DraftEnd, loop: DraftLoop) -> NoReturn:
    """Look into the mailbox between any two forwards; what is newest comes first."""
    busy_at, outcomes, told = time.perf_counter(), 0, 0
    while True:
        step = end.mailbox.receive()
        if end.mailbox.dropped > 2 * told:  # the first one, and then seldom: there may be one a step
            told = end.mailbox.dropped
            tell_dropped(told)
        if step is not None:
            loop.submit(step)
            before, outcomes = outcomes, outcomes + len(step.outcomes)
            if before < _TELL_AFTER <= outcomes:
                tell(loop.engine)
        elif not loop.advance():
            end.idle(busy_at)
            continue
        busy_at = time.perf_counter()


if __name__ == "__main__":
    main()
