"""The draft side in a process of its own: `python -m vllm_saguaro.vllm_hooks.draft_process`, started by
`placement/process.py`, or one that Ray started, whose actor calls `serve_invited`, or `open_pool` for several engines.

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
    from vllm_saguaro.drafting.kv import Blocks
    from vllm_saguaro.drafting.loop import DraftLoop
    from vllm_saguaro.drafting.model import DraftModel
    from vllm_saguaro.placement.draft_end import DraftEnd
    from vllm_saguaro.placement.pool import DraftPool
    from vllm_saguaro.vllm_hooks.draft_model import VllmDraftModel


_TELL_AFTER = 2048
"""Outcomes after which the log has what was learnt."""


def main() -> None:
    """Load the draft, say so, then keep tables ready until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us in order
    start = json.loads(sys.stdin.buffer.readline())
    options: dict[str, Any] = start["options"]
    if options["cpus"]:
        cores.pin(options["cpus"])

    from vllm_saguaro.placement.process import ProcessEnd

    end = ProcessEnd(start)
    end.end_with_parent()
    load_and_serve(end, options)


def serve_invited(start: Mapping[str, Any]) -> str:
    """Draft for the target side that sent an invitation, until that has gone; how that came about.

    `start`: `invitation`, `options`, `cpus` (cores of this machine to stay on, or none), `threads`. Raises what loading
    raises, after having told the target side.
    """
    _take_cores(start)

    from vllm_saguaro.placement.arrival import come
    from vllm_saguaro.placement.draft_end import TargetGone
    from vllm_saguaro.placement.meeting import Invitation

    with contextlib.closing(come(Invitation.from_dict(start["invitation"]))) as end:
        try:
            load_and_serve(end, start["options"])
        except TargetGone as gone:
            return str(gone)


def open_pool(start: Mapping[str, Any]) -> DraftPool:
    """The draft model for several engines, loaded in this thread, which is to `run` the pool.

    `start`: `ask` (the first engine's, as a dict), `engines`, `linger`, `cpus`, `threads`. Raises what loading raises.
    """
    _take_cores(start)

    from vllm.logger import init_logger

    from vllm_saguaro.placement.admission import Ask
    from vllm_saguaro.placement.pool import DraftPool

    first = Ask(**start["ask"])
    model = load_model(first.options)
    gc.freeze()
    logger = init_logger("vllm.vllm_saguaro.pool")
    return DraftPool(
        model,
        lambda ask, blocks: make_engine(model, ask.options, blocks),
        first,
        start["engines"],
        logger,
        start["linger"],
    )


def _take_cores(start: Mapping[str, Any]) -> None:
    """Stay on the cores that were planned; forget what this process was bound to, or had counted, for other work."""
    cpus: list[int] = start["cpus"]
    if cpus:
        cores.pin(cpus)
    environment = cores.draft_environment(dict(os.environ), range(start["threads"]))
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


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
    serve(end, DraftLoop(engine, end.mailbox.publish, end.mailbox.note))


def load_engine(options: Mapping[str, Any]) -> DraftEngine:
    """The engine that `options` describe: those of `DraftModelConfig` under "model", what it drafts beside it."""
    return make_engine(load_model(options), options)


def load_model(options: Mapping[str, Any]) -> VllmDraftModel:
    """The draft model, warm."""
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel

    model = VllmDraftModel(DraftModelConfig(**options["model"]))
    model.warm_up(rows=(options["branches"],))
    return model


def make_engine(model: DraftModel, options: Mapping[str, Any], pool: Blocks | None = None) -> DraftEngine:
    """What drafts over a model. `pool`: its share of the model's KV blocks; None: it has all of them."""
    from vllm_saguaro.algorithm.priors import Priors
    from vllm_saguaro.drafting.deflations import Deflations
    from vllm_saguaro.drafting.engine import DraftEngine
    from vllm_saguaro.drafting.pace import Pace

    branches, known = options["branches"], options.get("priors")
    priors = Priors.from_dict(known) if known is not None else None
    return DraftEngine(
        model,
        options["num_speculative_tokens"],
        branches,
        options["fan_out"],
        options["draft_sample_method"],
        pace=Pace(options["num_speculative_tokens"], branches, options["choose_branches"], priors),
        deflations=Deflations(options["num_speculative_tokens"], options["sampling_c"]),
        pool=pool,
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
        elif (rests := loop.rests) or not loop.advance():
            end.idle(busy_at, may_sleep=not (rests or (end.mailbox.from_device and len(loop))))
            continue
        busy_at = time.perf_counter()


if __name__ == "__main__":
    main()
