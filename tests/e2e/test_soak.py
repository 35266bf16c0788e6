"""`scripts/soak.py`, a few minutes of it: a real server, its draft killed twice and stopped once."""

from __future__ import annotations

import json

import pytest

from tests.e2e.harness import Json, run_script

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

REQUESTS = 150
FAULTS = ("--kills", "2", "--faults", "slow=1")
MINUTES = 15
"""It takes about three on two free cores."""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Json:
    folder = tmp_path_factory.mktemp("soak")
    report = folder / "report.json"
    kept = ("--state", str(folder / "state.jsonl"), "--report", str(report))
    work = ("--requests", str(REQUESTS), *FAULTS, "--warm-up", "30")
    done = run_script("soak.py", *work, *kept, minutes=MINUTES)
    assert report.exists(), done.stdout + done.stderr
    found: Json = json.loads(report.read_text())
    found["status"], found["output"] = done.returncode, done.stdout + done.stderr
    return found


def test_the_soak_passes(soaked: Json) -> None:
    assert soaked["accounts"]["failures"] == [], soaked["output"]
    assert soaked["status"] == 0, soaked["output"]


def test_every_request_has_one_fate_and_none_is_lost(soaked: Json) -> None:
    fates = soaked["accounts"]["fates"]
    assert sum(fates.values()) == REQUESTS
    assert "lost" not in fates
    assert fates["finished"] > REQUESTS / 2
    assert fates["closed"] > 0
    assert fates["refused"] > 0


def test_texts_that_can_be_compared_are_plain_vllms(soaked: Json) -> None:
    accounts = soaked["accounts"]
    assert accounts["compared"] == accounts["comparable"] > REQUESTS / 3
    assert accounts["equal"] + len(accounts["ties"]) == accounts["compared"]


def test_drafts_hit_again_after_every_fault(soaked: Json) -> None:
    assert soaked["faults_done"] == {"kill": 2, "slow": 1}
    for fault in soaked["faults"]:
        assert fault["hits_back"] is not None
        assert fault["new_process"] == (fault["kind"] == "kill")


def test_requests_were_in_flight_when_the_draft_was_killed(soaked: Json) -> None:
    assert any(fault["in_flight"] for fault in soaked["faults"] if fault["kind"] == "kill")


def test_nothing_is_left_of_the_server(soaked: Json) -> None:
    (stretch,) = soaked["stretches"]
    end = stretch["end"]
    assert (end["status"], end["left"], end["shared_memory"], end["ray_actors"]) == (0, [], [], 0)
    assert set(stretch["after"]) >= {"server", "EngineCore", "draft"}
    assert set(stretch["idle"].values()) == {0.0}
