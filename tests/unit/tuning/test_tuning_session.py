"""Which engines are tried, in which order, and what is chosen, on machines that are made up here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tuning.test_prediction import planted
from vllm_saguaro import tuned
from vllm_saguaro.benchmark.client import WorkerError
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.tuned import MadeFor
from vllm_saguaro.tuning import document, session
from vllm_saguaro.tuning.candidates import DRAFT_MODEL, PLAIN, SAGUARO, Candidate, Load, Tried
from vllm_saguaro.tuning.found import Tuning
from vllm_saguaro.tuning.measuring import Measured, steps_of
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.tuning.session import tune
from vllm_saguaro.tuning.settings import USUAL_KS, Settings
from vllm_saguaro.tuning.trials import most_engines, watched_candidate

SETTINGS = Settings("target", "draft", batches=(1, 4), temperatures=(0.0,), ks=(1, 2, 8))
HERE = MadeFor(("target", None), ("draft", None), "float32", "0.32.0", "X, 2 cores")


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations take most of the time of these tests."""
    monkeypatch.setattr(session, "SIZES", (4, 24))


Speed = Callable[[Mapping[str, Any]], float]


class Machine:
    """Engines whose speed over plain follows from their keys; it notes which were asked for."""

    def __init__(self, speed: Speed, baseline: float = 1.2, seconds: float = 0.0, failing: str = "nothing") -> None:
        self.asked: list[str] = []
        self._speed, self._baseline, self._seconds, self._failing = speed, baseline, seconds, failing

    def __call__(self, settings: Settings, candidate: Candidate, progress: Progress, watched: bool) -> Measured:
        if candidate == watched_candidate(settings):
            assert watched
        else:
            assert not watched
            self.asked.append(candidate.name)
        if self._failing in candidate.name:
            raise WorkerError(f"{candidate.name}: Traceback\nValueError: it is out of order\n--- end of its log\nbla")
        gain = {PLAIN: 1.0, DRAFT_MODEL: self._baseline}.get(candidate.method) or self._speed(candidate.keys)
        speeds = {load: 50.0 * load[0] * gain for load in settings.loads}
        spread = {load: (0.9 * speed, 1.1 * speed) for load, speed in speeds.items()}
        seen: dict[Load, Observations] = {load: planted(step=0.05) for load in settings.loads} if watched else {}
        return Measured(Tried(candidate, speeds, spread), seen, seconds=self._seconds)


def by_keys(keys: Mapping[str, Any]) -> float:
    none = keys.get("backup") == "none"
    return 1.5 + 0.1 * none - 0.2 * (keys.get("placement") == "inline") - 0.3 * ("branches" in keys)


def test_plain_comes_first_and_everything_is_compared_with_it() -> None:
    machine = Machine(by_keys)
    found = tune(SETTINGS, Progress(), machine)
    assert machine.asked[0] == "plain"
    assert machine.asked[1].startswith("draft_model K=")
    assert machine.asked[2].startswith("saguaro K=")
    assert [each.candidate.method for each in found.tried].count(PLAIN) == 1
    assert found.recommended == SAGUARO
    assert found.chosen.candidate.keys["backup"] == "none"
    assert "branches" not in found.chosen.candidate.keys


def test_a_step_further_begins_at_the_best_so_far() -> None:
    machine = Machine(by_keys)
    tune(SETTINGS, Progress(), machine)
    best = f"saguaro K={machine.asked[2].partition('=')[2]}"
    assert machine.asked[-4:] == [
        f"{best} {change}" for change in ("placement=inline", "backup=ngram", "backup=jit", "backup=none")
    ]


def test_no_engine_is_tried_twice() -> None:
    machine = Machine(by_keys)
    tune(SETTINGS, Progress(), machine)
    assert len(machine.asked) == len(set(machine.asked))


@pytest.mark.parametrize(
    ("baseline", "ours", "best"), [(2.0, 1.5, DRAFT_MODEL), (0.8, 0.9, PLAIN), (1.2, 1.5, SAGUARO)]
)
def test_what_is_faster_is_said(baseline: float, ours: float, best: str) -> None:
    assert tune(SETTINGS, Progress(), Machine(lambda _: ours, baseline)).recommended == best


def test_without_time_only_what_is_needed_is_tried_and_the_rest_is_named() -> None:
    machine = Machine(by_keys, seconds=100.0)
    found = tune(dataclasses.replace(SETTINGS, seconds=50.0), Progress(), machine)
    assert [name.partition(" ")[0] for name in machine.asked] == ["plain", "draft_model", "saguaro"]
    assert len(found.left_out) >= 3
    assert set(found.left_out.values()) == {"no time was left"}


def test_c_is_not_spoken_of_where_drafts_from_q_were_not_tried() -> None:
    settings = dataclasses.replace(SETTINGS, temperatures=(1.0,), seconds=50.0)
    found = tune(settings, Progress(), Machine(by_keys, seconds=100.0))
    assert any(name.startswith("saguaro") and "probabilistic" in name for name in found.left_out)
    assert not any(name.startswith("C ") for name in found.left_out)


def test_an_engine_that_fails_is_left_out_with_its_reason() -> None:
    found = tune(SETTINGS, Progress(), Machine(by_keys, failing="inline"))
    (name,) = [name for name in found.left_out if "inline" in name]
    assert found.left_out[name] == "it did not run: ValueError: it is out of order"
    assert "inline" not in found.chosen.candidate.name


def test_draft_model_may_fail_and_plain_may_not() -> None:
    assert tune(SETTINGS, Progress(), Machine(by_keys, failing="draft_model")).recommended == SAGUARO
    with pytest.raises(WorkerError):
        tune(SETTINGS, Progress(), Machine(by_keys, failing="plain"))
    with pytest.raises(WorkerError):
        tune(SETTINGS, Progress(), Machine(by_keys, failing="saguaro"))


def test_keys_that_the_user_wrote_are_not_tried_otherwise() -> None:
    machine = Machine(by_keys)
    fixed = {"backup": "jit", "placement": "process", "branches": 8}
    tune(dataclasses.replace(SETTINGS, fixed=fixed), Progress(), machine)
    assert not any(word in name for name in machine.asked for word in ("backup", "placement", "N="))


def sampled(machine: Machine, **fixed: Any) -> Tuning:
    return tune(dataclasses.replace(SETTINGS, temperatures=(0.0, 1.0), fixed=fixed), Progress(), machine)


def test_draft_model_draws_its_drafts_where_anything_is_sampled() -> None:
    machine = Machine(by_keys)
    sampled(machine)
    assert machine.asked[1].startswith("draft_model K=")
    assert machine.asked[1].endswith(" draft_sample_method=probabilistic")
    tune(SETTINGS, Progress(), greedy := Machine(by_keys))
    assert "draft_sample_method" not in greedy.asked[1]


def test_c_is_tried_only_where_drafts_from_q_are_not_slower() -> None:
    slower = Machine(lambda keys: 1.5 - 0.3 * ("draft_sample_method" in keys))
    found = sampled(slower)
    assert slower.asked[-1].endswith("draft_sample_method=probabilistic")
    assert found.left_out["C 1, 0.5, 0.1"] == "coupled drafts are not slower, and have no C"

    faster = Machine(lambda keys: 1.5 + 0.3 * ("draft_sample_method" in keys) + 0.2 * (keys.get("sampling_c") == 0.5))
    assert sampled(faster).chosen.candidate.keys["sampling_c"] == 0.5
    assert [name.rpartition(" ")[2] for name in faster.asked[-3:]] == ["C=1.0", "C=0.5", "C=0.1"]


def test_c_is_tried_for_who_asked_for_drafts_from_q() -> None:
    machine = Machine(lambda keys: 1.5 + 0.2 * (keys.get("sampling_c") == 0.1))
    assert sampled(machine, draft_sample_method="probabilistic").chosen.candidate.keys["sampling_c"] == 0.1
    assert sampled(Machine(by_keys), draft_sample_method="greedy").left_out == {}


def test_an_engine_that_cannot_be_watched_is_tried_without_prediction() -> None:
    machine = Machine(lambda keys: 1.0 + 0.1 * keys["num_speculative_tokens"])
    found = tune(dataclasses.replace(SETTINGS, on_host=False, placements=(), ks=USUAL_KS), Progress(), machine)
    assert machine.asked == ["plain", "draft_model K=4", "saguaro K=4", "saguaro K=2", "saguaro K=6"]
    assert found.chosen.candidate.keys == {"num_speculative_tokens": 6}
    assert document.document(found, HERE, {}, True)["priors"] is None


@pytest.mark.parametrize(("ks", "tried"), [((3,), [3]), ((2, 3, 4), [4, 2]), ((1, 3), [1, 3])])
def test_without_prediction_only_k_that_are_asked_for_are_tried(ks: tuple[int, ...], tried: list[int]) -> None:
    machine = Machine(by_keys)
    tune(dataclasses.replace(SETTINGS, on_host=False, placements=(), ks=ks), Progress(), machine)
    assert machine.asked == ["plain", f"draft_model K={tried[0]}", *(f"saguaro K={k}" for k in tried)]


def test_too_little_for_a_prediction_is_noted_and_real_engines_are_tried_all_the_same() -> None:
    class Blind(Machine):
        def __call__(self, *asked: Any) -> Measured:
            measured = super().__call__(*asked)
            return dataclasses.replace(measured, observations={load: Observations() for load in measured.observations})

    machine = Blind(by_keys)
    found = tune(SETTINGS, Progress(), machine)
    assert machine.asked[:3] == ["plain", "draft_model K=2", "saguaro K=2"]
    (note,) = found.notes
    assert note.startswith("nothing was predicted: no ")
    assert (found.worlds, found.predicted) == ({}, {})
    assert document.document(found, HERE, {}, True)["priors"] is None


@pytest.mark.parametrize(
    ("fixed", "sizes"),
    [({}, {4, 24}), ({"fan_out": "uncalibrated"}, {4, 24}), ({"fan_out": "uniform"}, {24}), ({"branches": 8}, {8})],
)
def test_smaller_n_are_predicted_where_the_watched_branches_show_them(fixed: dict[str, Any], sizes: set[int]) -> None:
    found = tune(dataclasses.replace(SETTINGS, fixed=fixed), Progress(), Machine(by_keys))
    assert {n for _, n in found.predicted} == sizes


def test_others_on_the_cores_are_noted() -> None:
    class Busy(Machine):
        def __call__(self, *asked: Any) -> Measured:
            return dataclasses.replace(super().__call__(*asked), foreign_cpu=0.4)

    (note,) = tune(SETTINGS, Progress(), Busy(by_keys)).notes
    assert "other processes took up to 40% of the cores" in note
    assert tune(SETTINGS, Progress(), Machine(by_keys)).notes == []


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_file_is_one_that_a_start_reads(tmp_path: Path) -> None:
    found = tune(SETTINGS, Progress(), Machine(by_keys))
    path = tmp_path / "new" / "tuned.json"
    document.write(document.document(found, HERE, {"date": "now"}, draft_is_own=False), path)
    file = tuned.read(str(path))
    assert file.choice == {"model": "draft", **found.chosen.candidate.keys}
    assert file.priors is not None
    assert len(file.priors.acceptance) == 8
    assert file.made_for == HERE
    assert file.doubts(HERE) is None


def test_a_draft_in_a_folder_is_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(SETTINGS, Progress(), Machine(by_keys))
    assert document.document(found, HERE, {}, False)["choice"]["model"] == "draft", "a name of the hub"
    (tmp_path / "draft").mkdir()
    monkeypatch.chdir(tmp_path)
    assert document.document(found, HERE, {}, False)["choice"]["model"] == str(tmp_path / "draft")


def test_the_file_keeps_all_measurements() -> None:
    data = document.document(tune(SETTINGS, Progress(), Machine(by_keys)), HERE, {"date": "now"}, draft_is_own=True)
    assert "model" not in data["choice"]
    assert {each["method"] for each in data["measured"]} == {PLAIN, DRAFT_MODEL, SAGUARO}
    assert {(each["k"], each["branches"]) for each in data["predicted"]} == {(k, n) for k in (1, 2, 8) for n in (4, 24)}
    assert [each["batch"] for each in data["by_batch"]] == [1, 4]
    assert all(each["fastest"].endswith("backup=none") for each in data["by_batch"])
    assert data["provenance"] == {"date": "now"}
    assert {(each["batch"], each["temperature"]) for each in data["observations"]} == set(SETTINGS.loads)


def test_the_table_marks_what_was_chosen() -> None:
    found = tune(SETTINGS, Progress(), Machine(by_keys))
    lines = document.table(found).splitlines()
    assert lines[1].split()[:3] == ["plain", "50.0", "200.0"]
    (marked,) = [line for line in lines if line.endswith("<- chosen")]
    assert marked.startswith(found.chosen.candidate.name)
    assert len(lines) == 1 + len(found.tried)


class Steps(Progress):
    """How many steps were announced, and how many came."""

    def __init__(self) -> None:
        self.announced, self.came, self.ended = 0, 0, False

    def begin(self, steps: int) -> None:
        self.announced = steps

    def step(self, doing: str) -> None:
        assert doing
        self.came += 1

    def end(self) -> None:
        self.ended = True


def test_no_more_steps_come_than_were_announced() -> None:
    """Each engine says that it starts, and each load that it runs, as `measuring.measure` does."""
    machine, steps = Machine(by_keys), Steps()

    def measuring(settings: Settings, candidate: Candidate, progress: Progress, watched: bool) -> Measured:
        for _ in range(steps_of(settings)):
            progress.step("it runs")
        return machine(settings, candidate, progress, watched)

    tune(SETTINGS, steps, measuring)
    engines = 1 + len(machine.asked)  # the one that is watched, too
    assert steps.came == engines * steps_of(SETTINGS) + 1 <= steps.announced  # and "predicting"
    assert steps.ended


def test_the_progress_bar_has_room_for_every_engine() -> None:
    inline = Machine(
        lambda keys: 1.5 + 0.3 * ("draft_sample_method" in keys) + 0.2 * (keys.get("placement") == "inline")
    )
    settings = sampled(inline).settings
    assert len(inline.asked) + 1 == most_engines(settings)
