from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.soaking.accounts import Accounts, examine, stretch_failures, unanswered, unreferred
from scripts.soaking.answers import Answer, Choice, Fate
from scripts.soaking.journal import Journal
from scripts.soaking.settings import Settings
from scripts.soaking.traffic import Traffic

SETTINGS = Settings(requests=60, faults={"kill": 2}, warm_up=10)


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic(SETTINGS)


def right(traffic: Traffic, index: int) -> Answer:
    """What a good server answers."""
    asked = traffic.request(index)
    if asked.refused:
        return Answer(index, Fate.REFUSED, "400: no")
    if asked.close_after is not None or asked.hold is not None:
        return Answer(index, Fate.CLOSED, "closed by us")
    tokens = tuple(range(asked.body["max_tokens"]))
    return Answer(index, Fate.FINISHED, choices=(Choice("text", tokens, "length"),) * asked.outputs)


def examined(
    traffic: Traffic,
    folder: Path,
    change: Callable[[Answer], list[Answer]] = lambda answer: [answer],
    referred: bool = True,
    again: list[dict[str, Any]] | None = None,
    faults: list[dict[str, Any]] | None = None,
) -> Accounts:
    """The verdict on a soak in which all went well but what `change` makes of the answers."""
    journal = Journal(folder / "state", SETTINGS.to_json())
    for index in range(SETTINGS.requests):
        for answer in change(right(traffic, index)):
            journal.add("answer", **answer.to_json())
        if referred and traffic.request(index).comparable:
            answer = right(traffic, index)
            if answer.fate == Fate.CLOSED:
                answer = Answer(index, Fate.FINISHED, choices=(Choice("text", (1,), "length"),))
            journal.add("reference", **answer.to_json())
    for record in again or ():
        journal.add("again", **record)
    for record in faults or ():
        journal.add("fault", **record)
    return examine(SETTINGS, traffic, journal)


def only(index: int, made: list[Answer]) -> Callable[[Answer], list[Answer]]:
    return lambda answer: made if answer.index == index else [answer]


def first(traffic: Traffic, comparable: bool = True) -> int:
    """The first request that is answered to its end."""
    return next(
        index
        for index in range(SETTINGS.requests)
        if right(traffic, index).fate == Fate.FINISHED and traffic.request(index).comparable == comparable
    )


def test_a_good_run_has_nothing_against_it(traffic: Traffic, tmp_path: Path) -> None:
    found = examined(traffic, tmp_path)
    assert found.failures == []
    assert found.finished
    assert found.equal == found.compared == found.comparable > 20
    assert sum(found.fates.values()) == SETTINGS.requests


def test_a_lost_answer_is_found(traffic: Traffic, tmp_path: Path) -> None:
    found = examined(traffic, tmp_path, only(7, [Answer(7, Fate.LOST, "status 500")]))
    assert found.failures == ["1 requests lost: 7 (status 500)"]


def test_an_answer_twice_is_found(traffic: Traffic, tmp_path: Path) -> None:
    found = examined(traffic, tmp_path, only(7, [right(traffic, 7)] * 2))
    assert found.failures == ["1 requests answered more than once: 7"]


def test_an_answer_to_nothing_is_found(traffic: Traffic, tmp_path: Path) -> None:
    odd = [right(traffic, 7), Answer(900, Fate.CLOSED)]
    found = examined(traffic, tmp_path, only(7, odd))
    assert found.failures == ["1 requests answered that were never asked: 900"]


def test_a_missing_answer_leaves_the_run_unfinished(traffic: Traffic, tmp_path: Path) -> None:
    found = examined(traffic, tmp_path, only(7, []))
    assert not found.finished
    assert found.failures == []


def test_a_run_without_references_is_unfinished(traffic: Traffic, tmp_path: Path) -> None:
    found = examined(traffic, tmp_path, referred=False)
    assert not found.finished
    assert found.compared == 0


def test_a_wrong_text_is_unsettled_until_plain_vllm_is_asked_again(traffic: Traffic, tmp_path: Path) -> None:
    index = first(traffic)
    wrong = dataclasses.replace(right(traffic, index), choices=(Choice("other", (5000,), "length"),))
    found = examined(traffic, tmp_path, only(index, [wrong]))
    assert len(found.unsettled) == 1
    assert not found.finished
    settled = {"index": index, "tie": False, "why": "it differs", "gap": 0.3}
    (tmp_path / "again").mkdir()
    found = examined(traffic, tmp_path / "again", only(index, [wrong]), again=[settled])
    assert found.finished
    assert found.equal == found.compared - 1
    (failure,) = found.failures
    assert failure.startswith(f"1 texts are not plain vLLM's: {index} (")


def test_a_tie_is_told_apart_and_is_no_failure(traffic: Traffic, tmp_path: Path) -> None:
    index = first(traffic)
    other = dataclasses.replace(right(traffic, index), choices=(Choice("other", (5000,), "length"),))
    settled = {"index": index, "tie": True, "why": "1e-6 nats apart", "gap": 1e-6}
    found = examined(traffic, tmp_path, only(index, [other]), again=[settled])
    assert found.finished
    assert found.failures == []
    assert [tie["index"] for tie in found.ties] == [index]
    assert found.equal == found.compared - 1


def test_nobody_is_asked_again_without_end(traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.soaking.accounts.MOST_ASKED_AGAIN", 0)
    index = first(traffic)
    wrong = dataclasses.replace(right(traffic, index), choices=(Choice("other", (5000,), "length"),))
    found = examined(traffic, tmp_path, only(index, [wrong]))
    assert found.finished
    assert len(found.wrong) == 1


def test_texts_that_nothing_decides_are_not_compared(traffic: Traffic, tmp_path: Path) -> None:
    index = first(traffic, comparable=False)
    other = dataclasses.replace(right(traffic, index), choices=(Choice("other", (5000,), "length"),))
    assert examined(traffic, tmp_path, only(index, [other])).failures == []


def test_a_complaint_is_a_failure(traffic: Traffic, tmp_path: Path) -> None:
    index = first(traffic)
    bad = dataclasses.replace(right(traffic, index), complaint="too long")
    assert examined(traffic, tmp_path, only(index, [bad])).failures == [
        f"1 requests with a wrong form: {index} (too long)"
    ]


def test_a_refusal_without_need_is_found(traffic: Traffic, tmp_path: Path) -> None:
    index = first(traffic, comparable=False)
    found = examined(traffic, tmp_path, only(index, [Answer(index, Fate.REFUSED, "400: busy")]))
    assert found.failures == [f"1 requests refused that should have been served: {index} (400: busy)"]


def test_what_should_have_been_refused_is_found(traffic: Traffic, tmp_path: Path) -> None:
    index = next(index for index in range(SETTINGS.requests) if traffic.request(index).refused)
    served = Answer(index, Fate.FINISHED, choices=(Choice("text", (1,), "length"),))
    settled = {"index": index, "tie": False, "why": "", "gap": None}
    found = examined(traffic, tmp_path, only(index, [served]), again=[settled])
    assert f"1 requests served that should have been refused: {index}" in found.failures


def test_hits_that_do_not_return_are_a_failure(traffic: Traffic, tmp_path: Path) -> None:
    faults = [{"number": number, "done": "SIGKILL", "hits_back": back} for number, back in ((0, 4.5), (1, None))]
    found = examined(traffic, tmp_path, faults=faults)
    assert found.failures == ["after 1 faults hits did not return: 2 (SIGKILL)"]


def test_what_is_still_to_be_done_follows_from_the_journal(traffic: Traffic, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", SETTINGS.to_json())
    assert unanswered(SETTINGS, journal) == list(range(60))
    for index in (0, 1, 2, 3, 50):
        journal.add("answer", **right(traffic, index).to_json())
    assert unanswered(SETTINGS, journal) == [index for index in range(4, 60) if index != 50]
    expected = [index for index in (0, 1, 2, 3, 50) if traffic.request(index).comparable]
    assert unreferred(traffic, journal) == expected
    journal.add("reference", **right(traffic, expected[0]).to_json())
    assert unreferred(traffic, journal) == expected[1:]


# ---- what a server holds, and leaves -------------------------------------------------------------------------------


def holding(memory: int = 100, descriptors: int = 30, threads: int = 10, processes: int = 1) -> dict[str, int]:
    return {"memory": memory << 20, "descriptors": descriptors, "threads": threads, "processes": processes}


GOOD: dict[str, Any] = {
    "ended_by_itself": False,
    "idle": {"running": 0.0, "waiting": 0.0, "cache_usage": 0.0},
    "before": {"server": holding(), "Worker": holding(), "draft": holding()},
    "after": {"server": holding(140), "Worker": holding(descriptors=33), "draft": holding(300)},
    "end": {"status": 0, "left": [], "shared_memory": [], "shared_memory_of_others": ["sem.x"], "ray_actors": 0},
}


def after(**changed: dict[str, int]) -> dict[str, Any]:
    return GOOD["before"] | changed


def looks(*mebibytes: int) -> list[dict[str, Any]]:
    return [{"seconds": 10.0 * at, "memory": {"server": each << 20}} for at, each in enumerate(mebibytes)]


def test_a_process_that_only_warms_up_is_good() -> None:
    grown = GOOD | {"after": after(server=holding(400)), "memory": looks(200, 300, 350, 380, 390, 400)}
    assert stretch_failures(grown) == []


def test_a_process_that_goes_on_growing_is_told() -> None:
    growing = GOOD | {"after": after(server=holding(400)), "memory": looks(100, 150, 200, 250, 300, 350)}
    assert stretch_failures(growing) == ["server grew from 200 to 400 MiB in the second half"]


def test_a_draft_that_is_started_again_may_become_as_large_as_the_one_before() -> None:
    memory = [{"seconds": 1.0, "memory": {"draft": each << 20} if each else {}} for each in (0, 0, 30, 40, 80, 110)]
    again = GOOD | {"before": after(), "after": after(draft=holding(120)), "memory": memory}
    assert stretch_failures(again) == []
    assert stretch_failures(again | {"after": after(draft=holding(220))}) == [
        "draft grew from 100 to 220 MiB in the second half"
    ]


@pytest.mark.parametrize(("cut_short", "told"), [([], ["there is no draft process any more"]), ([33], [])])
def test_a_draft_may_be_gone_where_a_stretch_ended_within_a_fault(cut_short: list[int], told: list[str]) -> None:
    gone = {name: process for name, process in GOOD["before"].items() if name != "draft"}
    stretch = GOOD | {"before": after(draft=holding(100)), "after": gone, "cut_short": cut_short}
    assert stretch_failures(stretch) == told
    assert stretch_failures(stretch | {"after": {}})[0] == "there is no server process any more"


def test_a_few_looks_say_nothing_about_growth() -> None:
    assert stretch_failures(GOOD | {"after": after(server=holding(400)), "memory": looks(100, 150, 200)}) == []


def test_a_stretch_that_ends_as_it_began_is_good() -> None:
    assert stretch_failures(GOOD) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ended_by_itself", True, "the server ended by itself"),
        ("idle", {"running": 1.0}, "running is 1 at the end, not 0"),
        ("idle", {"cache_usage": 0.01}, "cache_usage is 0.01 at the end, not 0"),
        ("idle", {}, "the server's metrics could not be read at the end"),
        ("after", after(server=holding(700)), "server grew from 100 to 700 MiB"),
        ("after", after(draft=holding(999)), "draft grew from 100 to 999 MiB"),
        ("after", after(Worker=holding(descriptors=60)), "Worker has 60 descriptors, 30 at the start"),
        ("after", after(Worker=holding(threads=60)), "Worker has 60 threads, 10 at the start"),
        ("after", {"server": holding(), "Worker": holding()}, "there is no draft process any more"),
        ("after", after(draft=holding(processes=2)), "draft has 2 processes, 1 at the start"),
        ("end", GOOD["end"] | {"status": -9}, "the server ended with status -9"),
        ("end", GOOD["end"] | {"left": ["77 python"]}, "left afterwards (left): 77 python"),
        ("end", GOOD["end"] | {"shared_memory": ["psm_1"]}, "left afterwards (shared_memory): psm_1"),
        ("end", GOOD["end"] | {"ray_actors": 2}, "2 Ray actors were left"),
    ],
)
def test_everything_that_is_not_as_it_was_is_told(key: str, value: Any, words: str) -> None:
    assert stretch_failures(copy.deepcopy(GOOD) | {key: value}) == [words]
