"""The first tokens of a continuation have the target's own distribution, by every path and with every setting.

A cell is one kind of draft, one path that drafts take, and one setting of the sampling parameters: many independent
requests run through several rounds of speculation and verification, and their texts are compared with the product of
the target's exact conditionals.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.exactness.judgement import SMALLEST_P, p_values
from tests.exactness.models import NEIGHBOURS, SETTINGS, conditionals
from tests.exactness.rounds import PATHS, Path, Samples, simulate
from tests.exactness.speculation import KINDS, Kind, Source
from vllm_saguaro.algorithm import sampling
from vllm_saguaro.drafting.trunk import Drawing
from vllm_saguaro.messages import Noise

UNCOUPLED = [name for name, kind in KINDS.items() if kind.drawing is not Drawing.COUPLED]
COUPLED = [name for name in KINDS if name not in UNCOUPLED]
SOURCES = {"n-gram": {Source.NGRAM}, "just in time": {Source.JIT}, "all": {Source.NGRAM, Source.JIT}}
"""Sources of drafts that a path must have had, beside hits and none."""

QUICK, QUICK_SEEDED = 15_000, 4_000
"""Samples where all settings are gone through in the ordinary run; `KINDS` has those of the slow one."""

NO_DRAFTS = Path(branches=1, restarted=1.0)


def check(kind: str, path: str, setting: str, samples: int | None = None) -> None:
    asked = SETTINGS[setting]
    found = simulate(KINDS[kind], PATHS[path], (asked,), samples)
    assert 0 < found.accepted < found.drafted
    assert set(np.unique(found.source)) == {Source.NONE, Source.HIT} | SOURCES.get(path, set())
    values = p_values(found, asked, kind in UNCOUPLED)
    assert min(values.values()) > SMALLEST_P, values


def quick(kind: str) -> int:
    return QUICK_SEEDED if KINDS[kind].noise is Noise.SEED else QUICK


@pytest.mark.parametrize("path", [path for path in PATHS if path != "all"])
@pytest.mark.parametrize("kind", UNCOUPLED)
def test_every_path(kind: str, path: str) -> None:
    check(kind, path, "T=1", quick(kind))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_over_all_paths(kind: str, setting: str) -> None:
    check(kind, "all", setting, quick(kind))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_path_with_every_setting(kind: str, path: str, setting: str) -> None:
    check(kind, path, setting)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_differ_in_one_batch(kind: str) -> None:
    found = simulate(KINDS[kind], PATHS["all"], NEIGHBOURS, 2 * quick(kind))
    for number, setting in enumerate(NEIGHBOURS):
        own = found.of(number, len(NEIGHBOURS))
        if setting.temperature:
            values = p_values(own, setting, kind in UNCOUPLED)
            assert min(values.values()) > SMALLEST_P, (setting, values)
        else:
            assert (own.outputs == greedy_text(number)).all()


def greedy_text(number: int) -> list[int]:
    """The one text of a greedy setting."""
    text, at = [], 0
    for p in conditionals(NEIGHBOURS[number]):
        text.append(int(p[at].argmax()))
        at = at * p.shape[1] + text[-1]
    return text


@pytest.mark.parametrize("kind", [*UNCOUPLED, "coupled by key"])
@pytest.mark.parametrize("setting", ["T=1", "top-k", "top-p"])
def test_a_q_of_fewer_candidates_than_the_target_has_tokens(
    kind: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SUPPORT", 3)
    check(kind, "all", setting, QUICK // 2)


# ---- coupled: the text does not depend on the drafts at all ---------------------------------------------------------


@cache
def without_drafts(kind: str, setting: str) -> Samples:
    return of_few(KINDS[kind], NO_DRAFTS, setting)


def of_few(kind: Kind, path: Path, setting: str) -> Samples:
    return simulate(kind, path, (SETTINGS[setting],), samples=2000, seed=3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", COUPLED)
def test_coupled_texts_are_those_without_drafts(kind: str, path: str) -> None:
    """(With a seed these are vLLM's own: no step of `NO_DRAFTS` has a draft, or an integer that we gave.)"""
    for setting in ("T=1", "all"):
        plain = without_drafts(kind, setting)
        assert plain.drafted == 0
        found = of_few(KINDS[kind], PATHS[path], setting)
        assert found.accepted > 1000
        assert np.array_equal(found.outputs, plain.outputs)


def test_coupling_is_what_gets_drafts_accepted() -> None:
    """Else the tests of coupled drafts would be tests of a sampler with bad luck."""
    rate = {}
    for kind, setting in product((*COUPLED, "sampled", "certain"), ("T=1", "T=1.5")):
        found = of_few(KINDS[kind], PATHS["hit"], setting)
        rate[kind, setting] = found.accepted / found.drafted
    for setting in ("T=1", "T=1.5"):
        for kind in COUPLED:
            assert rate[kind, setting] > rate["certain", setting] + 0.1, rate
