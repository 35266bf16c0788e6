"""The table of faults, in Markdown, its JSON, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.faulting.compare import Texts
from scripts.faulting.episode import Episode
from scripts.faulting.session import Run
from scripts.faulting.settings import Settings
from scripts.faulting.standing import most_waited
from vllm_saguaro.benchmark.provenance import warnings
from vllm_saguaro.benchmark.tables import NOTHING

SCHEMA = 1
_SHOWN = 5
_PLACEMENTS = {"process": "process", "ray": "Ray, this node", "nodes": "Ray, another node"}


def failures(runs: Sequence[Run], texts: Texts) -> list[str]:
    """One line for each kind of thing that is wrong; none: all is well."""
    found: list[str] = []
    for run in runs:
        where = f"{run.placement}: "
        if run.lost:
            some = ", ".join(str(each.answer.index) for each in run.lost[:_SHOWN])
            found.append(f"{where}{len(run.lost)} requests were lost ({some})")
        if not run.warm:
            found.append(f"{where}there were no hits before any fault")
        for episode in run.episodes:
            if episode.impossible:
                found.append(f"{where}{episode.kind}: {episode.done}")
            elif not episode.recovered:
                found.append(f"{where}{episode.kind}: it did not end as it must ({episode.done})")
        if run.ended_by_itself:
            found.append(f"{where}the server ended by itself")
        found += [f"{where}{line}" for line in _leftovers(run)]
    if texts.wrong:
        found.append(f"{len(texts.wrong)} texts are not plain vLLM's: {'; '.join(texts.wrong[:_SHOWN])}")
    if not texts.compared and any(run.told for run in runs):
        found.append("no text could be compared with plain vLLM's")
    return found


def _leftovers(run: Run) -> list[str]:
    if run.end is None:
        return ["the server's end was not seen"]
    left = {
        "processes": len(run.end.left),
        "names in shared memory": len(run.end.shared_memory),
        "Ray actors": run.end.ray_actors + run.actors_left,
        "placement groups": run.groups_left,
        "file descriptors": run.descriptors_left,
    }
    found = [f"{count} {what} were left" for what, count in left.items() if count]
    if run.end.status != 0:
        found.append(f"the server ended with status {run.end.status}")
    return found


def report_text(settings: Settings, about: dict[str, Any], runs: Sequence[Run], texts: Texts) -> str:
    """Both tables, with what they were measured on above and the verdict below."""
    git = about["git"]["revision"] or "unknown"
    changed = " with changes" if about["git"]["dirty"] else ""
    lines = [
        f"{about['processor']['model']}, {len(about['cores_allowed'])} cores, vLLM {about['versions']['vllm']}, "
        f"revision {git[:10]}{changed}, {about['date'][:10]}; {settings.concurrency} streams at a time. "
        "Longest gap: between two pieces of any stream. Waiting for a core: whoever did so longest in that gap.",
        "",
        faults_table(runs),
        "",
        leftovers_table(runs),
        "",
        f"Texts: {texts.compared} compared with plain vLLM's: {texts.equal} equal, {len(texts.ties)} ties, "
        f"{len(texts.wrong)} wrong.",
        *(f"  tie: {tie}" for tie in texts.ties),
        "",
        *(f"warning: {line}" for line in warnings(about)),
        *(f"FAILED: {line}" for line in failures(runs, texts)),
    ]
    return "\n".join(lines).rstrip()


def faults_table(runs: Sequence[Run]) -> str:
    """One row for each fault, in the order in which they were done."""
    rows = [
        (
            _PLACEMENTS[run.placement],
            str(episode.kind),
            episode.done,
            str(episode.in_flight),
            str(sum(each.lost for each in episode.requests(run.told))),
            _milliseconds(episode.quiet.longest),
            _milliseconds(episode.window.longest),
            _waited(episode),
            _seconds(episode.draft_up),
            _return(episode),
            str(episode.restarts),
        )
        for run in runs
        for episode in run.episodes
    ]
    headers = ("draft in", "fault", "done", "in flight", "lost", "longest gap before, ms", "longest gap, ms",
               "of it waiting for a core, ms", "draft up after, s", "hits after, s", "restarts")  # fmt: skip
    return markdown(headers, rows, left=3)


def leftovers_table(runs: Sequence[Run]) -> str:
    """What each server was asked, and what was left of it."""
    rows = []
    for run in runs:
        end = run.end
        left = [NOTHING] * 4
        if end is not None:
            actors = end.ray_actors + run.actors_left
            left = [str(n) for n in (len(end.left), len(end.shared_memory), actors, len(end.ray_folders))]
        rows.append(
            (_PLACEMENTS[run.placement], str(len(run.told)), str(len(run.lost)), *left, str(run.descriptors_left))
        )
    headers = ("draft in", "requests", "lost", "processes left", "shared memory left", "Ray actors left",
               "folders of Rays left", "descriptors left")  # fmt: skip
    return markdown(headers, rows)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table, the first `left` columns to the left."""
    marks = [":--" if column < left else "--:" for column in range(len(headers))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, marks, *rows))


def report_json(settings: Settings, about: dict[str, Any], runs: Sequence[Run], texts: Texts) -> dict[str, Any]:
    """All of it but the answers themselves."""
    return {
        "schema": SCHEMA,
        "provenance": about,
        "settings": settings.to_json(),
        "runs": [run.to_json() for run in runs],
        "texts": texts.to_json(),
        "failures": failures(runs, texts),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def _waited(episode: Episode) -> str:
    """Who waited longest for a core in the longest gap; a look more on either side may make it more than the gap."""
    most = most_waited(episode.spent)
    return NOTHING if most is None else f"{most[0]} {_milliseconds(min(most[1], episode.window.longest))}"


def _seconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds:.1f}"


def _return(episode: Episode) -> str:
    return f"left off, {episode.left_off:.1f}" if episode.left_off is not None else _seconds(episode.hits_back)
