"""The whole run: watch one engine, predict from it, try what is worth trying, choose from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.simulation.world import World, WorldError
from vllm_saguaro.tuning import prediction
from vllm_saguaro.tuning.candidates import (
    DRAFT_MODEL,
    SAGUARO,
    Candidate,
    Load,
    Speeds,
    Tried,
    first_of_the_best,
    gain,
    recommended,
    shortlist,
)
from vllm_saguaro.tuning.measuring import Measured, measure, plain, steps_of
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.tuning.settings import SIZES, Settings

WATCHED_BRANCHES: Final = 24
"""N of the engine that is watched: its tables show the hit rates of all smaller N as well."""
REAL_RUNS: Final = 3
"""(K, N) that are tried in a real engine."""
C_CHOICES: Final = (1.0, 0.5, 0.1)
RANKED: Final = ("ranked", "uncalibrated")
"""Fan-outs that give the branches to the likeliest outcomes."""
_MOST_ENGINES: Final = 13
_NOISE: Final = 0.05
"""A share of the cores' time that others may take before it is said."""
_WITHOUT_PREDICTION: Final = (4, 2, 6)
"""K where nothing is predicted, those of them that are asked for."""

Measure = Callable[[Settings, Candidate, Progress, bool], Measured]


@dataclass
class Tuning:
    """All that was found. `worlds` by temperature; `predicted` by (K, N); `left_out`: candidates with why."""

    settings: Settings
    tried: list[Tried] = field(default_factory=list)
    observations: dict[Load, Observations] = field(default_factory=dict)
    worlds: dict[float, World] = field(default_factory=dict)
    predicted: dict[tuple[int, int], Speeds] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def plain(self) -> Speeds:
        """Tokens a second without speculation."""
        return self.tried[0].speeds

    @property
    def chosen(self) -> Tried:
        """The best of saguaro."""
        return first_of_the_best([each for each in self.tried if each.candidate.method == SAGUARO], self.plain)

    @property
    def recommended(self) -> str:
        """The method that was fastest."""
        others = [each for each in self.tried if each.candidate.method != SAGUARO]
        return recommended(self.chosen, others, self.plain)


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
    progress.begin(_MOST_ENGINES * steps_of(settings))
    try:
        run.add(plain(), must=True)
        if settings.watched:
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


def watched_candidate(settings: Settings) -> Candidate:
    """The engine that is looked into."""
    return Candidate(
        SAGUARO,
        {
            "num_speculative_tokens": max(settings.ks),
            "branches": WATCHED_BRANCHES,
            "backup": "none",
            "adaptive": False,
        },
    )


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


def first_candidates(found: Tuning) -> Iterator[Candidate]:
    """draft_model at its best K; of saguaro the best K with N left to the engine, the first of them also with its N."""
    ks = _best_ks(found)
    baseline = Candidate(DRAFT_MODEL, {"num_speculative_tokens": _best_for_draft_model(found)})
    # vLLM's default takes each draft as if it were certain: at temperature > 0 fewer are accepted.
    yield baseline.changed(draft_sample_method="probabilistic") if any(found.settings.temperatures) else baseline
    for place, (k, n) in enumerate(ks):
        own = Candidate(SAGUARO, {"num_speculative_tokens": k})
        yield own
        if place == 0 and n and "branches" not in found.settings.fixed:
            yield own.changed(branches=n)


def _best_ks(found: Tuning) -> list[tuple[int, int]]:
    if found.predicted:
        return shortlist(found.predicted, found.plain, REAL_RUNS)
    asked = found.settings.ks
    return [(k, 0) for k in [k for k in _WITHOUT_PREDICTION if k in asked] or asked]


def _best_for_draft_model(found: Tuning) -> int:
    """By the same model; where nothing was predicted the first that saguaro is tried with."""
    if not found.worlds:
        return _best_ks(found)[0][0]
    loads, ks = found.settings.loads, found.settings.ks
    predicted = {(k, 0): {load: prediction.predict(found.worlds, load, k, 0, "sd") for load in loads} for k in ks}
    return shortlist(predicted, found.plain, 1)[0][0]


def further_candidates(found: Tuning) -> Iterator[Candidate]:
    """From the best so far, one key at a time: the backup, the placement, the way to draw and C."""
    fixed = found.settings.fixed
    best = found.chosen.candidate
    if not found.settings.watched:
        return
    if "backup" not in fixed:
        yield best.changed(backup="none")
        best = found.chosen.candidate
    if "placement" not in fixed:
        yield best.changed(placement="inline")
    best = found.chosen.candidate
    yield from _ways_to_draw(found, best)


def _ways_to_draw(found: Tuning, best: Candidate) -> Iterator[Candidate]:
    """Drafts from the draft's own q, and C, where anything is sampled. C matters for those alone."""
    settings = found.settings
    if not any(settings.temperatures) or "sampling_c" in settings.fixed:
        return
    method = settings.fixed.get("draft_sample_method", "coupled")
    if method != "probabilistic":
        if "draft_sample_method" in settings.fixed:
            return
        best = best.changed(draft_sample_method="probabilistic")
        yield best
        if found.chosen.candidate != best:
            if any(each.candidate == best for each in found.tried):
                found.left_out[f"C {_joined(C_CHOICES)}"] = "coupled drafts are not slower, and have no C"
            return
    for c in C_CHOICES:
        yield best.changed(sampling_c=c)


def by_batch(found: Tuning) -> Mapping[int, Mapping[str, float]]:
    """Tokens a second over plain, by batch and candidate: the geometric mean over the temperatures."""
    return {
        batch: {
            each.candidate.name: gain(
                {load: speed for load, speed in each.speeds.items() if load[0] == batch}, found.plain
            )
            for each in found.tried
        }
        for batch in found.settings.batches
    }


def _joined(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _last_line(text: str) -> str:
    """The line of an error of a worker that says what it was: the last one before its log."""
    return text.partition("\n--- end of its log")[0].strip().rpartition("\n")[2].strip()
