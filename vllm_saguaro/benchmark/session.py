"""The run itself: load every engine once, then let them take turns, A B C A B C, on the same cores."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark import procfs, provenance
from vllm_saguaro.benchmark.client import WorkerHandle
from vllm_saguaro.benchmark.counters import HITS, count
from vllm_saguaro.benchmark.deepened import deepened
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.benchmark.records import Engine, Repetition, Report, Run, Workload, digest
from vllm_saguaro.benchmark.settings import Settings
from vllm_saguaro.benchmark.summary import find, summarise

WARM_UP_TOKENS = 24
WARM_UP_BATCHES = 2

_WORKER_BYTES = 1_700 << 20
"""What an engine takes, about: 1.3 GB were seen for the pair itself, and a deepened target adds to it."""

_FOREIGN = 0.02
"""A share of the cores' time that others may take before the report says so."""

_IDLE = 0.05
"""A share of one core that an engine may take while it has nothing to do."""


def measure(settings: Settings, progress: Progress | None = None, warn: Callable[[str], None] = print) -> Report:
    """Run the whole benchmark. A warning is given to `warn` when it becomes known, and kept in the report."""
    settings.check()
    progress = progress or Progress()
    engines, workloads = settings.engines(), settings.workloads()
    about = provenance.collect(settings.cores)
    report = Report(
        about, settings.to_json(), {}, [Run(engine, workload) for workload in workloads for engine in engines]
    )

    def note(text: str) -> None:
        report.notes.append(text)
        warn(text)

    for text in [*provenance.warnings(about), *_memory_warnings(len(engines)), *_core_warnings(settings)]:
        note(text)
    progress.begin(1 + len(engines) + settings.repetitions * len(report.runs))
    try:
        progress.step("deepening" if settings.target_layers or settings.draft_layers else "looking at the pair")
        target = deepened(settings.target, settings.target_layers)
        draft = deepened(settings.draft_path, settings.draft_layers)
        with _terminated_as_interrupted(), _workers() as start:
            workers: dict[Engine, WorkerHandle] = {}
            for engine in engines:
                progress.step(f"loading {engine.name}")
                workers[engine] = start(engine.name)
                with workers[engine].turn():
                    report.engines[engine.name] = workers[engine].ask(settings.order(engine, target, draft))
                    for workload in workloads:
                        workers[engine].ask(_order(settings, workload, warm_up=True))
                    report.engines[engine.name]["idle_cpu"] = _idle_share(workers[engine])
            _take_turns(settings, report, workers, progress)
    finally:
        progress.end()
    for text in [*_interference(report), *_broken(report)]:
        note(text)
    report.summaries = {name: summary.to_json() for name, summary in summarise(report.runs).items()}
    return report


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: killed at once, it would leave a draft process that is frozen for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _workers() -> Iterator[Callable[[str], WorkerHandle]]:
    """A function that starts workers; all of them end with the block."""
    started: list[WorkerHandle] = []
    with tempfile.TemporaryDirectory(prefix="saguaro-bench-") as logs:

        def start(name: str) -> WorkerHandle:
            worker = WorkerHandle(name, Path(logs) / f"{len(started)}.log")
            started.append(worker)
            return worker

        try:
            yield start
        finally:
            for worker in started:
                worker.begin_close()
            for worker in started:
                worker.close()


def _order(settings: Settings, workload: Workload, warm_up: bool = False) -> dict[str, Any]:
    prompts, tokens = settings.prompts, settings.tokens
    if warm_up:
        prompts, tokens = min(WARM_UP_BATCHES * workload.batch, prompts), min(WARM_UP_TOKENS, tokens)
    return {**dataclasses.asdict(workload), "prompts": prompts, "tokens": tokens}


def _idle_share(worker: WorkerHandle, seconds: float = 1.0) -> float:
    """The share of one core that an engine takes while nobody asks it anything."""
    before = worker.cpu_seconds()
    time.sleep(seconds)
    return round(max(0.0, worker.cpu_seconds() - before) / seconds, 3)  # a child that ended is missing


def _take_turns(settings: Settings, report: Report, workers: dict[Engine, WorkerHandle], progress: Progress) -> None:
    reference: dict[tuple[Workload, int], list[list[int]]] = {}
    for repetition in range(settings.repetitions):
        for workload in settings.workloads():
            for engine in settings.engines():
                progress.step(f"{repetition + 1}/{settings.repetitions} {workload.name}: {engine.name}")
                found, token_ids = _one_repetition(settings, workload, workers[engine])
                if engine.mode == "plain" and workload.temperature == 0:
                    reference[workload, repetition] = token_ids
                plain_ids = reference.get((workload, repetition))
                if plain_ids is not None:
                    found.same_text = sum(mine == theirs for mine, theirs in zip(token_ids, plain_ids, strict=True))
                find(report.runs, engine, workload).repetitions.append(found)


def _one_repetition(settings: Settings, workload: Workload, worker: WorkerHandle) -> tuple[Repetition, list[list[int]]]:
    """Ask one worker, and watch who else uses the cores meanwhile."""
    with worker.turn():
        worker.ask(_order(settings, workload, warm_up=True))  # what the others have pushed out of the caches
        others = procfs.share_of_others(settings.cores, worker.cpu_seconds)
        answer = worker.ask(_order(settings, workload))
        foreign = others()
    token_ids: list[list[int]] = answer.pop("token_ids")
    digests = [digest(ids) for ids in token_ids]
    return Repetition(**answer, digests=digests, foreign_cpu=round(foreign, 4)), token_ids


def _memory_warnings(engines: int) -> list[str]:
    available, needed = procfs.available_bytes(), engines * _WORKER_BYTES
    if available >= needed:
        return []
    return [
        f"{engines} engines need about {needed / 2**30:.0f} GiB at once and {available / 2**30:.0f} are available: "
        "ask for fewer --k, --branches or --fan-out in one run"
    ]


def _core_warnings(settings: Settings) -> list[str]:
    if "saguaro" not in settings.modes or not set(settings.target_cores) & set(settings.draft_cores):
        return []
    return ["target and draft of saguaro share a core: nothing can be hidden that way"]


def _interference(report: Report) -> list[str]:
    """Who disturbed: others, by the worst repetition, and engines that do not rest when they have nothing to do."""
    found: list[str] = []
    run, worst = max(
        ((run, repetition.foreign_cpu) for run in report.runs for repetition in run.repetitions),
        key=lambda pair: pair[1],
    )
    if worst > _FOREIGN:
        found.append(f"other processes took up to {worst:.0%} of the cores while measuring ({run.name})")
    for name, engine in report.engines.items():
        if engine["idle_cpu"] > _IDLE:
            found.append(f"{name} took {engine['idle_cpu']:.0%} of a core with nothing to do")
    return found


def _broken(report: Report) -> list[str]:
    """Runs whose numbers say nothing of the method, because it did not work."""
    return [
        f"{run.name}: no table was ever there when it was needed; is the draft side running?"
        for run in report.runs
        if run.engine.mode == "saguaro" and not sum(count(one.counters, HITS) for one in run.repetitions)
    ]
