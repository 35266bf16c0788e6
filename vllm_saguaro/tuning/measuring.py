"""One engine after the other, each in a process of its own that is gone before the next one starts."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.benchmark import procfs
from vllm_saguaro.benchmark.client import WorkerHandle
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.tuning.candidates import PLAIN, SAGUARO, Candidate, Load, Tried, fixed_while_watched
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.tuning.settings import Settings

MODULE: Final = "vllm_saguaro.tuning.worker"
_WARM_UP_TOKENS: Final = 16
_SHARE_OF_A_REPETITION: Final = 1 / 20
"""Of all the time that there is. On a slow machine the texts become shorter rather than the wait longer."""


@dataclass
class Measured:
    """What an engine did: its speeds, what was seen inside it by load, and who else used the cores meanwhile."""

    tried: Tried
    observations: dict[Load, Observations] = field(default_factory=dict)
    foreign_cpu: float = 0.0
    seconds: float = 0.0


def measure(settings: Settings, candidate: Candidate, progress: Progress, watched: bool = False) -> Measured:
    """Start it, let it serve every load, end it. Raises WorkerError where it cannot be started or fails."""
    began = time.monotonic()
    found = Measured(Tried(candidate, {}))
    with _worker(settings, candidate) as worker:
        progress.step(f"starting {candidate.name}")
        worker.ask(order_of(settings, candidate, watched))
        for load in settings.loads:
            progress.step(f"{candidate.name}: {_name(load)}")
            _serve(settings, load, worker, found)
    found.seconds = time.monotonic() - began
    return found


def steps_of(settings: Settings) -> int:
    """Steps of the progress bar for one engine."""
    return 1 + len(settings.loads)


def order_of(settings: Settings, candidate: Candidate, watched: bool) -> dict[str, Any]:
    """What the worker is told first."""
    watched = watched and candidate.method == SAGUARO
    fixed = fixed_while_watched(settings.fixed) if watched else settings.fixed
    return {
        "cores": list(settings.cores),
        "threads": None,
        "target": settings.target,
        "words": list(settings.words),
        "llm": {"speculative_config": candidate.speculative_config(settings.draft, fixed)},
        "prompts": list(settings.prompts),
        "prompt_tokens": settings.prompt_tokens,
        "forecasts": False,
        "watched": watched,
    }


def _serve(settings: Settings, load: Load, worker: WorkerHandle, found: Measured) -> None:
    batch, temperature = load
    prompts = settings.prompts_of(batch)
    order = {"batch": batch, "temperature": temperature, "top_p": 1.0, "prompts": prompts, "tokens": settings.tokens}
    warm = worker.ask({**order, "prompts": batch, "tokens": min(_WARM_UP_TOKENS, settings.tokens)})
    order["tokens"] = tokens_in_time(settings, batch, _speed(warm))
    speeds, seen = [], []
    for _ in range(settings.repetitions):
        others = procfs.share_of_others(settings.cores, worker.cpu_seconds)
        answer = worker.ask(order)
        found.foreign_cpu = max(found.foreign_cpu, others())
        speeds.append(_speed(answer))
        if answer["observations"] is not None:
            seen.append(Observations.from_json(answer["observations"]))
    found.tried.speeds[load] = statistics.median(speeds)
    found.tried.spread[load] = min(speeds), max(speeds)
    if seen:
        found.observations[load] = Observations.together(seen)


def tokens_in_time(settings: Settings, batch: int, speed: float) -> int:
    """New tokens of each prompt: as many as are asked for, fewer where a repetition would take too long.

    `speed`: tokens a second of all requests together.
    """
    seconds = settings.seconds * _SHARE_OF_A_REPETITION
    waves = -(-settings.prompts_of(batch) // batch)
    return max(min(_WARM_UP_TOKENS, settings.tokens), min(settings.tokens, int(seconds * speed / batch / waves)))


def _speed(answer: dict[str, Any]) -> float:
    return float(answer["decode_tokens"] / answer["decode_seconds"])


@contextlib.contextmanager
def _worker(settings: Settings, candidate: Candidate) -> Iterator[WorkerHandle]:
    """The process; in good order it ends by itself, else at once with all below it."""
    with tempfile.TemporaryDirectory(prefix="saguaro-tune-") as folder:
        worker = WorkerHandle(candidate.name, Path(folder) / "log.txt", MODULE, settings.offline)
        try:
            yield worker
        except BaseException:
            worker.end_now()
            raise
        worker.close()


def _name(load: Load) -> str:
    batch, temperature = load
    return f"batch {batch}, T={temperature:g}"


def plain() -> Candidate:
    """vLLM without speculation."""
    return Candidate(PLAIN)
