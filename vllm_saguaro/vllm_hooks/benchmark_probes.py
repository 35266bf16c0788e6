"""Where the benchmark reaches into an engine of its own process: vLLM's drafting, our draft side's forecasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_saguaro.benchmark.forecasts import ForecastProbe


@dataclass
class Stopwatch:
    """Adds up the time spent in one function."""

    seconds: float = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def runner_of(llm: Any) -> Any:
    """vLLM's model runner: the engine is in this process, so it can be reached."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def watch_drafting(llm: Any) -> Stopwatch:
    """Time vLLM's own drafting: on the CPU it happens inside one call of the model runner, which waits for it.

    What is timed is what is on the target's way: the draft's forward passes with the preparation of its inputs. Runner
    V2 has no such call, and its host waits for none: there nothing is timed.
    """
    stopwatch = Stopwatch()
    runner = runner_of(llm)
    if hasattr(runner, "propose_draft_token_ids"):
        runner.propose_draft_token_ids = stopwatch.wrap(runner.propose_draft_token_ids)
    return stopwatch


class ForecastWatch:
    """The forecasts of saguaro's draft side, which is in this process with `placement=inline`."""

    def __init__(self, llm: Any) -> None:
        engine = runner_of(llm).drafter.speculator.channel._engine
        self._probe = ForecastProbe(engine.forecaster, engine.branches)
        engine.forecaster.learn = self._probe.wrap(engine.forecaster.learn)

    def counts(self) -> dict[str, float]:
        """What was counted until now."""
        return self._probe.counts()
