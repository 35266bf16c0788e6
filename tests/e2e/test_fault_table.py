"""`scripts/faults.py`: a real server and two or three faults, in a process and on a Ray node that is lost."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.e2e.harness import Json, run_script

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]  # five minutes: a draft is loaded after each

MINUTES = 15
"""It takes about two on two free cores."""


def faulted(tmp_path_factory: pytest.TempPathFactory, *words: str) -> Json:
    output = tmp_path_factory.mktemp("faults") / "out.json"
    done = run_script("faults.py", *words, "--seconds", "3", "--output", str(output), minutes=MINUTES)
    assert output.exists(), done.stdout + done.stderr
    found: Json = json.loads(output.read_text())
    found["status"], found["output"] = done.returncode, done.stdout + done.stderr
    found["table"] = output.with_suffix(".md").read_text()
    return found


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Json:
    return faulted(tmp_path_factory, "--placement", "process", "--only", "slow", "oom", "dying")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Json:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("there is no Ray here")
    return faulted(tmp_path_factory, "--placement", "nodes", "--only", "cut", "node")


@pytest.fixture(params=["process", "nodes"])
def either(request: pytest.FixtureRequest) -> Json:
    found: Json = request.getfixturevalue(request.param)
    return found


def test_all_is_well(either: Json) -> None:
    assert either["failures"] == [], either["output"]
    assert either["status"] == 0, either["output"]


def test_no_request_is_lost_though_some_were_in_flight(either: Json) -> None:
    (run,) = either["runs"]
    assert run["lost"] == []
    assert all(fault["in_flight"] > 0 for fault in run["faults"])
    assert all(fault["lost"] == 0 for fault in run["faults"])
    assert all(fault["longest_gap"] > 0 for fault in run["faults"])


def test_texts_that_can_be_compared_are_plain_vllms(either: Json) -> None:
    texts = either["texts"]
    assert texts["compared"] > 20
    assert texts["equal"] + len(texts["ties"]) == texts["compared"]


def test_a_draft_that_is_slow_is_not_started_again_and_one_without_memory_is(process: Json) -> None:
    slow, oom, dying = process["runs"][0]["faults"]
    assert (slow["restarts"], oom["restarts"]) == (0, 1)
    assert slow["hits_back"] is not None
    assert oom["hits_back"] is not None
    assert dying["hits_back"] is None
    assert dying["left_off"] is not None
    assert dying["restarts"] >= 2


def test_a_draft_whose_link_or_node_is_lost_is_started_again(nodes: Json) -> None:
    for fault in nodes["runs"][0]["faults"]:
        assert fault["hits_back"] is not None
        assert fault["restarts"] == 1


def test_nothing_is_left(either: Json) -> None:
    (run,) = either["runs"]
    end = run["end"]
    assert (end["status"], end["left"], end["shared_memory"], end["ray_actors"]) == (0, [], [], 0)
    assert (run["actors_left"], run["placement_groups_left"], run["descriptors_left"]) == (0, 0, 0)


def test_every_fault_has_a_row(either: Json) -> None:
    faults = [fault["fault"] for fault in either["runs"][0]["faults"]]
    rows = [line.split("|")[2].strip() for line in either["table"].splitlines() if line.startswith("| ")]
    assert set(faults) <= set(rows)
