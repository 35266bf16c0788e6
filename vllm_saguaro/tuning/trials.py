"""Which engines are tried, in which order: each is asked for when those before it have been measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from vllm_saguaro.config import AUTO, INLINE_BRANCHES, MAX_BRANCHES
from vllm_saguaro.drafting.buckets import default_branches
from vllm_saguaro.tuning import prediction
from vllm_saguaro.tuning.candidates import DRAFT_MODEL, SAGUARO, Candidate, shortlist
from vllm_saguaro.tuning.found import Tuning
from vllm_saguaro.tuning.settings import Settings

WATCHED_BRANCHES: Final = 24
"""N of the engine that is watched: its tables show the hit rates of all smaller N as well."""
REAL_RUNS: Final = 3
"""(K, N) that are tried in a real engine."""
BACKUPS_IN_TURN: Final = ("ngram", "jit", "none")
"""Beside the default, those that brought more first (docs/results.md)."""
C_CHOICES: Final = (1.0, 0.5, 0.1)
_WITHOUT_PREDICTION: Final = (4, 2, 6)
"""K where nothing is predicted, those of them that are asked for."""
_SIZES_BESIDE: Final = 2
_FIRST_ENGINES: Final = 4 + REAL_RUNS
"""Plain, the watched one, draft_model, the best (K, N), and the first of them with its N."""


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
    """From the best so far, one key at a time.

    First what no engine chooses while it runs. Ray last: where its cluster is full, a start waits long for room.
    """
    settings = found.settings
    found.left_out |= {f"placement={name}": why for name, why in settings.placements_left_out.items()}
    yield from _elsewhere(found, [name for name in settings.placements if name != "ray"])
    yield from _each(found, "branches", _other_sizes(found))
    if settings.on_host:
        yield from _each(found, "backup", BACKUPS_IN_TURN)
    if any(settings.temperatures):
        yield from _each(found, "draft_sample_method", ["probabilistic"])
        yield from _values_of_c(found)
    yield from _elsewhere(found, [name for name in settings.placements if name == "ray"])


def most_engines(settings: Settings) -> int:
    """How many are tried at most; for the progress bar."""
    backups = len(BACKUPS_IN_TURN) if settings.on_host else 0
    drawn = 1 + len(C_CHOICES) if any(settings.temperatures) else 0
    return _FIRST_ENGINES + len(settings.placements) + _SIZES_BESIDE + backups + drawn


def _each(found: Tuning, key: str, values: Sequence[Any]) -> Iterator[Candidate]:
    """The best so far with each value of a key; none where the user has written it."""
    if key not in found.settings.fixed:
        for value in values:
            yield found.chosen.candidate.changed(**{key: value})


def _elsewhere(found: Tuning, placements: Sequence[str]) -> Iterator[Candidate]:
    """The best so far with each placement, without its N: that was found for the one before."""
    for candidate in _each(found, "placement", placements):
        yield Candidate(candidate.method, {key: value for key, value in candidate.keys.items() if key != "branches"})


def _effective(found: Tuning, key: str, usual: Any) -> Any:
    """What the best so far has of a key."""
    return {**found.chosen.candidate.keys, **found.settings.fixed}.get(key, usual)


def _placement(found: Tuning) -> str:
    return str(_effective(found, "placement", found.settings.usual_placement))


def _other_sizes(found: Tuning) -> Sequence[int]:
    """N of half and twice the size, where the engine has one N: in a process it chooses while it runs."""
    k = found.chosen.candidate.keys["num_speculative_tokens"]
    usual = {"inline": INLINE_BRANCHES, "stream": default_branches(k)}.get(_placement(found))
    if usual is None:
        return ()
    written = _effective(found, "branches", AUTO)
    n = usual if written == AUTO else written
    return max(1, n // 2), min(2 * n, MAX_BRANCHES)


def _values_of_c(found: Tuning) -> Iterator[Candidate]:
    """C, if the best so far draws from the draft's own q: nothing else looks at it."""
    way = _effective(found, "draft_sample_method", "coupled")
    if way == "probabilistic":
        values = C_CHOICES[1:] if _placement(found) == "stream" else C_CHOICES  # a stream's own C is 1
        yield from _each(found, "sampling_c", values)
    elif "sampling_c" not in found.settings.fixed and _both_ways_were_tried(found):
        found.left_out[f"C {', '.join(f'{c:g}' for c in C_CHOICES)}"] = f"{way} drafts are not slower, and have no C"


def _both_ways_were_tried(found: Tuning) -> bool:
    ours = [each.candidate.keys for each in found.tried if each.candidate.method == SAGUARO]
    return len({keys.get("draft_sample_method") for keys in ours}) > 1
