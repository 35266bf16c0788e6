"""Whether every request was answered, once, and rightly: the verdict on a soak, from its journal alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scripts.soaking.answers import Answer, Fate
from scripts.soaking.journal import Journal, Record
from scripts.soaking.references import MOST_ASKED_AGAIN, difference
from scripts.soaking.settings import Settings
from scripts.soaking.traffic import Traffic

MEMORY_GROWTH = 512 << 20
"""Bytes by which a process may have grown since the warm-up: plain vLLM's own worker grows by 400 MiB in the first
thousand requests, which find ever new shapes, and then hardly any more."""
LATE_GROWTH = 96 << 20
"""Bytes by which it may have grown in the second half of a stretch."""
DESCRIPTORS_GROWTH = 8
"""A server's sockets and pipes come and go; a leak of one for each request or fault is beyond this at once."""
THREADS_GROWTH = 8
_ENOUGH_LOOKS = 4
_SHOWN = 8


@dataclass
class Accounts:
    """What became of all requests. `unsettled`: texts that differ, for which plain vLLM is still to be asked again.

    `failures`: one line for each kind of thing that is wrong; none: all is well. `finished`: whether all was asked that
    was to be asked, of both servers; if not, the soak can be gone on with.
    """

    fates: Counter[str] = field(default_factory=Counter)
    comparable: int = 0
    compared: int = 0
    equal: int = 0
    ties: list[Record] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"fates": dict(self.fates)}


def unanswered(settings: Settings, journal: Journal) -> list[int]:
    """Requests that have no fate yet."""
    answered = {record["index"] for record in journal.of("answer")}
    return [index for index in range(settings.requests) if index not in answered]


def unreferred(traffic: Traffic, journal: Journal) -> list[int]:
    """Answered requests that plain vLLM must be asked, too, and has not been."""
    known = {record["index"] for record in journal.of("reference")}
    answered = {record["index"] for record in journal.of("answer") if record["fate"] != Fate.LOST}
    return [index for index in sorted(answered - known) if traffic.request(index).comparable]


def examine(settings: Settings, traffic: Traffic, journal: Journal) -> Accounts:
    """Count and compare everything."""
    found = Accounts()
    missing, unknown = unanswered(settings, journal), unreferred(traffic, journal)
    _examine_answers(settings, traffic, journal, found)
    _examine_texts(traffic, journal, found)
    found.finished = not missing and not unknown and not found.unsettled
    found.failures += _faults(journal.of("fault"))
    for number, stretch in enumerate(journal.of("stretch"), 1):
        found.failures += [f"stretch {number}: {line}" for line in stretch_failures(stretch)]
    return found


def _examine_answers(settings: Settings, traffic: Traffic, journal: Journal, found: Accounts) -> None:
    answers = [Answer.from_json(record) for record in journal.of("answer")]
    found.fates = Counter(answer.fate.value for answer in answers)
    lost, complaints, refused, accepted = [], [], [], []
    for answer in answers:
        expected = traffic.request(answer.index).refused
        if answer.fate == Fate.LOST:
            lost.append(f"{answer.index} ({answer.reason})")
        if answer.complaint:
            complaints.append(f"{answer.index} ({answer.complaint})")
        if answer.fate == Fate.REFUSED and not expected:
            refused.append(f"{answer.index} ({answer.reason})")
        if answer.fate == Fate.FINISHED and expected:
            accepted.append(str(answer.index))
    times = Counter(answer.index for answer in answers)
    twice = [str(index) for index, count in times.items() if count > 1]
    strange = [str(index) for index in times if not 0 <= index < settings.requests]
    for what, cases in (
        ("lost", lost),
        ("answered more than once", twice),
        ("answered that were never asked", strange),
        ("with a wrong form", complaints),
        ("refused that should have been served", refused),
        ("served that should have been refused", accepted),
    ):
        if cases:
            found.failures.append(f"{len(cases)} requests {what}: {_some(cases)}")


def _examine_texts(traffic: Traffic, journal: Journal, found: Accounts) -> None:
    theirs = {record["index"]: Answer.from_json(record) for record in journal.of("reference")}
    again = {record["index"]: record for record in journal.of("again")}
    for record in journal.of("answer"):
        ours = Answer.from_json(record)
        asked = traffic.request(ours.index)
        if not asked.comparable or ours.fate == Fate.LOST:
            continue
        found.comparable += 1
        if ours.index not in theirs:
            continue
        found.compared += 1
        differs = difference(ours, theirs[ours.index])
        settled = again.get(ours.index)
        if not differs:
            found.equal += 1
        elif settled is not None and settled["tie"]:
            found.ties.append({"index": ours.index, "difference": differs, **settled})
        elif settled is not None or len(again) >= MOST_ASKED_AGAIN:
            found.wrong.append(f"{ours.index} ({differs})")
        else:
            found.unsettled.append(f"{ours.index} ({differs})")
    if found.wrong:
        found.failures.append(f"{len(found.wrong)} texts are not plain vLLM's: {_some(found.wrong)}")


def _faults(records: Iterable[Record]) -> list[str]:
    silent = [f"{record['number'] + 1} ({record['done']})" for record in records if record["hits_back"] is None]
    return [f"after {len(silent)} faults hits did not return: {_some(silent)}"] if silent else []


def stretch_failures(stretch: Record) -> list[str]:
    """What was not as it was at the start, and what was left at the end."""
    found = []
    if stretch.get("ended_by_itself"):
        found.append("the server ended by itself")
    idle = stretch.get("idle") or {}
    if not idle:
        found.append("the server's metrics could not be read at the end")
    found += [f"{name} is {value:g} at the end, not 0" for name, value in idle.items() if value]
    before, after = stretch.get("before", {}), stretch.get("after", {})
    for name, was in before.items():
        now = after.get(name)
        if now is None:
            if name != "draft" or not stretch.get("cut_short"):
                found.append(f"there is no {name} process any more")
            continue
        half = _memory_at_half(stretch, name)
        if now["memory"] - was["memory"] > MEMORY_GROWTH:
            found.append(f"{name} grew from {was['memory'] >> 20} to {now['memory'] >> 20} MiB")
        elif half is not None and now["memory"] - half > LATE_GROWTH:
            found.append(f"{name} grew from {half >> 20} to {now['memory'] >> 20} MiB in the second half")
        for what, slack in (("descriptors", DESCRIPTORS_GROWTH), ("threads", THREADS_GROWTH), ("processes", 0)):
            if now[what] - was[what] > slack:
                found.append(f"{name} has {now[what]} {what}, {was[what]} at the start")
    end = stretch.get("end") or {}
    if end.get("status") != 0:
        found.append(f"the server ended with status {end.get('status')}")
    for what in ("left", "shared_memory"):
        if end.get(what):
            found.append(f"left afterwards ({what}): {_some(end[what])}")
    if end.get("ray_actors"):
        found.append(f"{end['ray_actors']} Ray actors were left")
    return found


def _memory_at_half(stretch: Record, name: str) -> int | None:
    """Bytes of the processes of one name in the middle of a stretch; None if they were not looked at then.

    A draft process that has been started again begins anew, with little: so the highest of the first half counts.
    """
    looks = [look["memory"].get(name, 0) for look in stretch.get("memory", ())]
    first = looks[: (len(looks) + 1) // 2]
    return max(stretch["before"][name]["memory"], *first) if len(looks) >= _ENOUGH_LOOKS else None


def _some(cases: list[str]) -> str:
    more = f", and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
    return ", ".join(cases[:_SHOWN]) + more
