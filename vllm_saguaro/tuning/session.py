"""The whole run: watch one engine, predict from it, try what is worth trying, choose from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.simulation.world import WorldError
from vllm_saguaro.tuning import prediction
from vllm_saguaro.tuning.candidates import DRAFT_MODEL, Candidate
from vllm_saguaro.tuning.found import Tuning
from vllm_saguaro.tuning.measuring import Measured, measure, plain, steps_of
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.tuning.settings import SIZES, Settings
from vllm_saguaro.tuning.trials import (
    WATCHED_BRANCHES,
    first_candidates,
    further_candidates,
    most_engines,
    watched_candidate,
)

RANKED: Final = ("ranked", "uncalibrated")
"""Fan-outs that give the branches to the likeliest outcomes."""
_NOISE: Final = 0.05
"""A share of the cores' time that others may take before it is said."""

Measure = Callable[[Settings, Candidate, Progress, bool], Measured]


class _Run:
    """Engines, one after the other, as long as there is time."""

    def __init__(self, settings: Settings, progress: Progress, measuring: Measure) -> None:
        self.found = Tuning(settings)
        self._settings, self._progress, self._measure = settings, progress, measuring
        self._deadline = time.monotonic() + settings.seconds
        self._longest = 0.0
        self._foreign = 0.0

    def take(self, candidate: Candidate, *, must: bool = False, watched: bool = False) -> Measured | None:
        """Measure it; None where it was tried before, there is no time (unless it `must`), or it fails.

        A failure of what nothing can be said without is raised.
        """
        if any(each.candidate == candidate for each in self.found.tried) or candidate.name in self.found.left_out:
            return None
        if not must and time.monotonic() + self._longest > self._deadline:
            self.found.left_out[candidate.name] = "no time was left"
            return None
        try:
            measured = self._measure(self._settings, candidate, self._progress, watched)
        except WorkerError as error:
            if must and candidate.method != DRAFT_MODEL:
                raise
            self.found.left_out[candidate.name] = f"it did not run: {_last_line(str(error))}"
            return None
        self._longest = max(self._longest, measured.seconds)
        self._foreign = max(self._foreign, measured.foreign_cpu)
        return measured

    def add(self, candidate: Candidate, *, must: bool = False) -> None:
        """One more that is tried."""
        measured = self.take(candidate, must=must)
        if measured is not None:
            self.found.tried.append(measured.tried)

    def finish(self) -> Tuning:
        """What was found, with what should be known about it."""
        if self._foreign > _NOISE:
            self.found.notes.append(
                f"other processes took up to {self._foreign:.0%} of the cores meanwhile: the choice is as good as that "
                "allows"
            )
        return self.found


def tune(settings: Settings, progress: Progress, measuring: Measure = measure) -> Tuning:
    """Measure, predict, try, choose. Raises WorkerError where the first engines do not run."""
    began = time.monotonic()
    run = _Run(settings, progress, measuring)
    progress.begin(most_engines(settings) * steps_of(settings))
    try:
        run.add(plain(), must=True)
        if settings.on_host:
            _watch(run, settings)
            progress.step("predicting")
            try:
                _predict(run.found, settings)
            except WorldError as error:
                run.found.worlds, run.found.predicted = {}, {}
                run.found.notes.append(f"nothing was predicted: {error}")
        for number, candidate in enumerate(first_candidates(run.found)):
            run.add(candidate, must=number <= 1)
        for candidate in further_candidates(run.found):
            run.add(candidate)
    finally:
        progress.end()
    found = run.finish()
    found.seconds = time.monotonic() - began
    return found


def _watch(run: _Run, settings: Settings) -> None:
    """The engine that everything is predicted from: it drafts as deep as it can and takes whatever comes."""
    measured = run.take(watched_candidate(settings), must=True, watched=True)
    assert measured is not None
    run.found.observations = measured.observations


def _predict(found: Tuning, settings: Settings) -> None:
    seen = found.observations
    whole = Observations.together(seen.values())
    written = settings.fixed.get("branches")
    branches = written if isinstance(written, int) else WATCHED_BRANCHES
    ranked = settings.fixed.get("fan_out", RANKED[0]) in RANKED  # elsewhere N branches are not the first of N + 1
    sizes = SIZES if branches is not written and ranked else (branches,)
    for temperature in settings.temperatures:
        own = Observations.together(part for (_, at), part in seen.items() if at == temperature)
        found.worlds[temperature] = prediction.world_of(whole, own, branches, max(settings.ks), f"T={temperature:g}")
    found.predicted = prediction.predictions(found.worlds, settings.loads, settings.ks, sizes)


def _last_line(text: str) -> str:
    """The line of an error of a worker that says what it was: the last one before its log."""
    return text.partition("\n--- end of its log")[0].strip().rpartition("\n")[2].strip()
