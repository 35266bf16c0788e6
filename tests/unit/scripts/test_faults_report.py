from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.faulting.compare import Texts
from scripts.faulting.episode import Episode
from scripts.faulting.report import failures, faults_table, report_json, report_text
from scripts.faulting.session import Run
from scripts.faulting.settings import Kind, Settings
from scripts.faulting.standing import Spent
from scripts.faulting.streams import Told
from scripts.soaking.answers import Answer, Fate
from scripts.soaking.server import End
from scripts.soaking.stalls import Window

ABOUT: dict[str, Any] = {
    "processor": {"model": "a processor"},
    "cores_allowed": [0, 1],
    "cores_used": [0, 1],
    "versions": {"vllm": "0.32"},
    "git": {"revision": "0123456789abcdef", "dirty": True},
    "date": "2026-01-02T03:04:05",
    "busy_before": 0.0,
}
SETTINGS = Settings(placements=("process",))
HELD = {"processes": 1, "memory": 1 << 20, "descriptors": 20, "threads": 3}


def told(index: int, begin: float, end: float, fate: Fate = Fate.FINISHED, complaint: str = "") -> Told:
    return Told(Answer(index, fate, "it broke" if fate == Fate.LOST else "", complaint=complaint), begin, end)


def good() -> Run:
    killed = Episode(
        "process", Kind.KILL, "SIGKILL", 4, Window(0, 10, 0.05), Window(10, 20, 0.2), 5.25, 5.0, restarts=1
    )
    died = Episode(
        "process", Kind.DYING, "each", 4, Window(20, 30, 0.06), Window(30, 60, 0.3), left_off=27.0, restarts=4
    )
    killed.spent = {"Worker": Spent(0.02, 0.15), "reader": Spent(0.0, 0.01)}
    run = Run("process", [killed, died], [told(0, 5, 12), told(1, 12, 35)], warm=True)
    run.before, run.after = {"server": dict(HELD), "draft": dict(HELD)}, {"server": dict(HELD)}
    run.end = End(0, 1.0, [], [], [], 0)
    return run


TEXTS = Texts(2, 2)


def test_a_good_run_has_no_failures_and_a_row_for_each_fault() -> None:
    assert failures([good()], TEXTS) == []
    header, _, killed, died = faults_table([good()]).splitlines()
    assert header.startswith("| draft in | fault | done | in flight | lost |")
    assert killed == "| process | kill | SIGKILL | 4 | 0 | 50 | 200 | Worker 150 | 5.0 | 5.2 | 1 |"
    assert died == "| process | dying | each | 4 | 0 | 60 | 300 | - | - | left off, 27.0 | 4 |"


def lost(run: Run) -> None:
    run.told.append(told(2, 15, 16, Fate.LOST))


def wrong_form(run: Run) -> None:
    run.told.append(told(2, 70, 71, complaint="too short"))


def cold(run: Run) -> None:
    run.warm = False


def no_hits(run: Run) -> None:
    run.episodes[0].hits_back = None


def hits_of_the_dead(run: Run) -> None:
    run.episodes[1].left_off, run.episodes[1].hits_back = None, 3.0


def impossible(run: Run) -> None:
    run.episodes[0].impossible = True


def gone(run: Run) -> None:
    run.ended_by_itself = True


def descriptors(run: Run) -> None:
    run.after["server"]["descriptors"] += 2


def groups(run: Run) -> None:
    run.groups_left = 1


def actors(run: Run) -> None:
    run.actors_left = 1


def ends(**how: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        assert run.end is not None
        run.end = dataclasses.replace(run.end, **how)

    return change


def unseen(run: Run) -> None:
    run.end = None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lost, "1 requests were lost (2)"),
        (wrong_form, "1 requests were lost (2)"),
        (cold, "there were no hits before any fault"),
        (no_hits, "kill: it did not end as it must"),
        (hits_of_the_dead, "dying: it did not end as it must"),
        (impossible, "kill: SIGKILL"),
        (gone, "the server ended by itself"),
        (descriptors, "2 file descriptors were left"),
        (groups, "1 placement groups were left"),
        (actors, "1 Ray actors were left"),
        (ends(left=["12 a"]), "1 processes were left"),
        (ends(shared_memory=["a", "b"]), "2 names in shared memory were left"),
        (ends(status=1), "the server ended with status 1"),
        (unseen, "the server's end was not seen"),
    ],
)
def test_what_is_wrong_is_told(change: Callable[[Run], None], expected: str) -> None:
    run = good()
    change(run)
    (line,) = failures([run], TEXTS)
    assert expected in line


def test_texts_are_part_of_the_verdict() -> None:
    (line,) = failures([good()], Texts(2, 1, wrong=["request 1: another"]))
    assert "1 texts are not plain vLLM's: request 1: another" in line
    assert failures([good()], Texts(2, 1, ties=["request 1: a tie"])) == []
    assert failures([good()], Texts()) == ["no text could be compared with plain vLLM's"]


def test_a_lost_request_counts_for_the_windows_that_it_touches() -> None:
    run = good()
    run.told.append(told(2, 15, 35, Fate.LOST))
    run.told.append(told(3, 61, 62, Fate.LOST))
    assert [episode.to_json(run.told)["lost"] for episode in run.episodes] == [1, 1]
    assert [row.split("|")[5].strip() for row in faults_table([run]).splitlines()[2:]] == ["1", "1"]


def test_descriptors_of_processes_that_end_with_a_draft_are_not_left() -> None:
    run = good()
    run.after["draft"] = HELD | {"descriptors": 50}
    assert run.descriptors_left == 0


def test_the_text_has_tables_and_verdict_and_the_json_all_of_it() -> None:
    run = good()
    text = report_text(SETTINGS, ABOUT, [run], Texts(2, 1, ties=["request 7: a tie"]))
    assert "revision 0123456789 with changes" in text
    assert "| process | 2 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "tie: request 7" in text
    assert "FAILED" not in text
    lost(run)
    assert "FAILED: process: 1 requests were lost (2)" in report_text(SETTINGS, ABOUT, [run], TEXTS)
    found = json.loads(json.dumps(report_json(SETTINGS, ABOUT, [run], TEXTS)))
    assert found["failures"] == ["process: 1 requests were lost (2)"]
    assert found["runs"][0]["lost"] == ["request 2: it broke"]
    assert [each["fault"] for each in found["runs"][0]["faults"]] == ["kill", "dying"]
    assert found["provenance"] == ABOUT
