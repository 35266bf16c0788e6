"""Which engines follow on the best so far, and in which order; how fast they are is made up here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from vllm_saguaro.config import split_options
from vllm_saguaro.device_options import on_device, on_host
from vllm_saguaro.tuning.candidates import SAGUARO, Candidate, Tried
from vllm_saguaro.tuning.found import Tuning
from vllm_saguaro.tuning.measuring import plain
from vllm_saguaro.tuning.settings import Settings
from vllm_saguaro.tuning.trials import BACKUPS_IN_TURN, C_CHOICES, further_candidates

CPU = Settings("target", "draft", batches=(1,), temperatures=(0.0,))
CUDA = dataclasses.replace(CPU, on_host=False, usual_placement="stream", placements=("process",))
FIRST: Mapping[str, Any] = {"num_speculative_tokens": 4}

Speed = Callable[[Mapping[str, Any]], float]


def tried(candidate: Candidate, settings: Settings, speed: float) -> Tried:
    return Tried(candidate, dict.fromkeys(settings.loads, speed))


def follow(settings: Settings, speed: Speed, without: str = "nothing", **first: Any) -> tuple[list[str], Tuning]:
    """What follows on one engine of saguaro: each change in turn. `without`: engines of such a name do not run."""
    begin = Candidate(SAGUARO, {**FIRST, **first})
    found = Tuning(settings, [tried(plain(), settings, 1.0), tried(begin, settings, speed(begin.keys))])
    names = []
    for candidate in further_candidates(found):
        names.append(candidate.name.removeprefix("saguaro K=4 "))
        if without not in candidate.name:
            found.tried.append(tried(candidate, settings, speed(candidate.keys)))
    return names, found


def all_alike(keys: Mapping[str, Any]) -> float:
    return 1.5


def favouring(**best: Any) -> Speed:
    """Each of these values makes an engine faster."""
    return lambda keys: 1.5 + 0.2 * sum(keys.get(key) == value for key, value in best.items())


def sampled(settings: Settings, **fixed: Any) -> Settings:
    return dataclasses.replace(settings, temperatures=(0.0, 1.0), fixed=fixed)


def test_on_the_host_the_placement_every_backup_and_what_is_drawn_are_tried() -> None:
    names, found = follow(sampled(CPU), all_alike)
    assert names == [
        "placement=inline",
        "backup=ngram",
        "backup=jit",
        "backup=none",
        "draft_sample_method=probabilistic",
    ]
    assert found.chosen.candidate.keys == FIRST, "of equals the first"
    assert found.left_out == {"C 1, 0.5, 0.1": "coupled drafts are not slower, and have no C"}


@pytest.mark.parametrize("backup", BACKUPS_IN_TURN)
def test_whichever_backup_is_the_best_is_chosen(backup: str) -> None:
    _, found = follow(CPU, favouring(backup=backup))
    assert found.chosen.candidate.keys == {**FIRST, "backup": backup}


def test_of_backups_within_the_margin_the_earlier_one_is_chosen() -> None:
    gains = {"ngram": 0.1, "jit": 0.11, "none": 0.12}
    _, found = follow(CPU, lambda keys: 1.5 + gains.get(keys.get("backup", ""), 0.0))
    assert found.chosen.candidate.keys["backup"] == "ngram"


def test_each_change_is_made_to_the_best_so_far() -> None:
    best = favouring(backup="jit", draft_sample_method="probabilistic", sampling_c=0.5)
    names, found = follow(sampled(CPU), best)
    assert names[3:] == [
        "backup=none",
        "backup=jit draft_sample_method=probabilistic",
        *(f"backup=jit draft_sample_method=probabilistic C={c}" for c in C_CHOICES),
    ]
    assert found.chosen.candidate.keys == {
        **FIRST,
        "backup": "jit",
        "draft_sample_method": "probabilistic",
        "sampling_c": 0.5,
    }


def test_inline_has_one_n_and_others_are_tried() -> None:
    names, _ = follow(CPU, favouring(placement="inline", branches=6))
    assert names[:3] == ["placement=inline", "placement=inline N=6", "placement=inline N=24"]
    assert names[3] == "placement=inline N=6 backup=ngram"
    names, _ = follow(CPU, favouring(placement="inline"), branches=48)
    assert names[:3] == ["placement=inline", "placement=inline N=6", "placement=inline N=24"], "N of its own"


def test_a_placement_that_is_not_possible_is_not_tried_and_named() -> None:
    settings = dataclasses.replace(CPU, placements=(), placements_left_out={"ray": "needs Ray"})
    names, found = follow(settings, all_alike)
    assert [name for name in names if "placement" in name] == []
    assert found.left_out == {"placement=ray": "needs Ray"}


def test_ray_comes_last() -> None:
    settings = dataclasses.replace(sampled(CPU), placements=("inline", "ray"))
    names, _ = follow(settings, favouring(backup="ngram"))
    assert [name for name in names if "placement" in name] == ["placement=inline", "backup=ngram placement=ray"]
    assert names[-1].endswith("placement=ray")


@pytest.mark.parametrize(
    ("key", "value"),
    [("backup", "jit"), ("placement", "process"), ("draft_sample_method", "coupled"), ("sampling_c", 0.3)],
)
def test_what_the_user_wrote_stays(key: str, value: Any) -> None:
    settings = sampled(dataclasses.replace(CPU, placements=("inline", "ray")), **{key: value})
    names, _ = follow(settings, favouring(draft_sample_method="probabilistic"))
    short = {"sampling_c": "C"}.get(key, key)
    assert not any(f"{short}=" in name for name in names)
    assert names, "all else is tried"


def test_n_of_the_user_stays_where_the_engine_has_one() -> None:
    names, _ = follow(dataclasses.replace(CPU, fixed={"branches": 8}), favouring(placement="inline"))
    assert not any("N=" in name for name in names)


def test_drafts_from_q_are_tried_with_the_users_c() -> None:
    names, _ = follow(sampled(CPU, sampling_c=0.3), all_alike)
    assert names[-1] == "draft_sample_method=probabilistic"


def test_an_engine_that_does_not_run_is_gone_past() -> None:
    names, found = follow(CPU, favouring(backup="ngram"), without="ngram")
    assert names[1:] == ["backup=ngram", "backup=jit", "backup=none"]
    assert found.chosen.candidate.keys == FIRST


def test_on_a_device_there_are_no_backups() -> None:
    names, found = follow(sampled(CUDA), all_alike)
    assert names == [
        "placement=process",
        "N=10",
        "N=40",
        "draft_sample_method=probabilistic",
    ]
    assert found.chosen.candidate.keys == FIRST
    assert found.left_out == {"C 1, 0.5, 0.1": "coupled drafts are not slower, and have no C"}


@pytest.mark.parametrize(("placement", "values"), [("process", C_CHOICES), ("stream", C_CHOICES[1:])])
def test_on_a_device_a_c_that_is_one_anyway_is_not_tried(placement: str, values: tuple[float, ...]) -> None:
    where = {} if placement == "stream" else {"placement": placement}
    names, _ = follow(sampled(CUDA), favouring(**where, draft_sample_method="probabilistic"))
    assert [name.rpartition("C=")[2] for name in names if "C=" in name] == [f"{c}" for c in values]


def test_on_a_device_a_draft_with_a_process_chooses_its_n() -> None:
    names, _ = follow(sampled(CUDA), favouring(placement="process"))
    assert names == ["placement=process", "placement=process draft_sample_method=probabilistic"]


@pytest.mark.parametrize("speed", [all_alike, favouring(placement="process"), favouring(placement="inline")])
@pytest.mark.parametrize("settings", [sampled(CPU), sampled(CUDA)], ids=["host", "device"])
def test_a_start_refuses_none_of_them(settings: Settings, speed: Speed) -> None:
    _, found = follow(settings, speed)
    for each in found.tried[1:]:
        options = each.candidate.speculative_config("draft", settings.fixed)
        assert options is not None
        config, _ = split_options(options)
        checked = on_host(config, options) if settings.on_host else on_device(config, options)
        assert checked.placement == each.candidate.keys.get("placement", settings.usual_placement)
