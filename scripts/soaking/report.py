"""The tables of a soak, and its JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scripts.soaking.accounts import Accounts
from scripts.soaking.journal import SCHEMA, Journal, Record
from scripts.soaking.settings import KINDS, Settings
from scripts.soaking.stalls import added, quantile
from vllm_saguaro.benchmark.tables import NOTHING, render

_ROWS = 24
"""Faults that get a row each; beyond, only their kinds do. The JSON has all of them."""


def report_text(settings: Settings, accounts: Accounts, journal: Journal) -> str:
    """All tables, and the verdict."""
    stretches, faults = journal.of("stretch"), journal.of("fault")
    lines = [_about(settings, stretches), "", requests_table(settings, accounts), ""]
    lines += [_texts(accounts), ""]
    undone = settings.faults_planned - len(faults)
    if accounts.finished and undone:
        lines += [f"{undone} of {settings.faults_planned} faults were not done: a sitting ended while they were", ""]
    if faults:
        lines += [faults_table(faults, stretches), ""]
        if len(faults) <= _ROWS:
            lines += [fault_rows(faults), ""]
    for number, stretch in enumerate(stretches, 1):
        lines += [f"== stretch {number}", stretch_table(stretch), ""]
    for plain in journal.of("plain"):
        lines += ["== plain vLLM, for comparison", holdings_table(plain), ""]
    lines += [f"FAILED: {line}" for line in accounts.failures]
    if not accounts.finished:
        lines.append("not finished: the same command with the same --state goes on")
    elif not accounts.failures:
        lines.append("all is accounted for")
    return "\n".join(lines)


def _about(settings: Settings, stretches: Sequence[Record]) -> str:
    if not stretches:
        return "nothing has been asked yet"
    about = stretches[-1]["provenance"]
    git = about["git"]["revision"] or "unknown"
    changed = " with changes" if about["git"]["dirty"] else ""
    seconds = sum(stretch.get("seconds", 0) for stretch in stretches)
    return (
        f"{about['processor']['model']}, vLLM {about['versions']['vllm']}, revision {git[:10]}{changed}; "
        f"seed {settings.seed}, {settings.concurrency} at once, placement {settings.placement}; "
        f"{len(stretches)} stretches, {seconds / 60:.1f} minutes of traffic"
    )


def requests_table(settings: Settings, accounts: Accounts) -> str:
    """What became of the requests."""
    names = ("finished", "closed", "refused", "lost")
    counts = [str(accounts.fates.get(name, 0)) for name in names]
    return render(("requests", *names), [(f"{sum(accounts.fates.values())} of {settings.requests}", *counts)])


def _texts(accounts: Accounts) -> str:
    words = (
        f"texts: {accounts.compared} of {accounts.comparable} comparable ones compared with plain vLLM: "
        f"{accounts.equal} equal, {len(accounts.ties)} ties, {len(accounts.wrong)} wrong"
    )
    words += f", {len(accounts.unsettled)} to be asked again" if accounts.unsettled else ""
    return "\n".join([words, *(f"  tie: request {tie['index']}: {tie['why']}" for tie in accounts.ties)])


def usual_gaps(stretches: Sequence[Record]) -> dict[str, float]:
    """The times between two pieces of a stream outside of faults, in seconds."""
    bins = added(stretch.get("usual_gaps", {}) for stretch in stretches)
    longest = max((stretch.get("longest_usual_gap", 0.0) for stretch in stretches), default=0.0)
    return {"median": quantile(bins, 0.5), "p99": quantile(bins, 0.99), "longest": longest}


def faults_table(faults: Sequence[Record], stretches: Sequence[Record]) -> str:
    """One row for each kind of fault: medians, and the largest."""
    usual = usual_gaps(stretches)
    headers = ("fault", "times", "in flight", "lost", "longest stall ms", "draft up after s", "hits after s", "no hits")
    rows = []
    for kind in KINDS:
        these = [fault for fault in faults if fault["kind"] == kind]
        if these:
            back = [fault["hits_back"] for fault in these if fault["hits_back"] is not None]
            flight = [len(fault["in_flight"]) for fault in these]
            rows.append(
                (
                    kind,
                    str(len(these)),
                    _spread(flight, 0),
                    str(sum(fault["lost"] for fault in these)),
                    _spread([1e3 * fault["longest_stall"] for fault in these], 0),
                    _spread([fault["draft_up"] for fault in these if fault["draft_up"] is not None], 1),
                    _spread(back, 1),
                    str(len(these) - len(back)),
                )
            )
    note = (
        f"medians (largest); between two pieces of a stream without a fault: median {1e3 * usual['median']:.0f} ms, "
        f"p99 {1e3 * usual['p99']:.0f} ms, longest {1e3 * usual['longest']:.0f} ms"
    )
    return render(headers, rows) + "\n" + note


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return NOTHING
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})"


def fault_rows(faults: Sequence[Record]) -> str:
    """One row for each fault."""
    headers = (
        "fault",
        "at request",
        "done",
        "in flight",
        "lost",
        "longest stall ms",
        "draft up after s",
        "hits after s",
    )
    rows = [
        (
            f"{fault['number'] + 1} {fault['kind']}",
            str(fault["position"]),
            fault["done"],
            str(len(fault["in_flight"])),
            str(fault["lost"]),
            f"{1e3 * fault['longest_stall']:.0f}",
            *(NOTHING if fault[what] is None else f"{fault[what]:.1f}" for what in ("draft_up", "hits_back")),
        )
        for fault in sorted(faults, key=lambda fault: fault["number"])
    ]
    return render(headers, rows, left=3)


def holdings_table(stretch: Record) -> str:
    """What the processes held after the warm-up and at the end."""
    before, after = stretch.get("before", {}), stretch.get("after", {})
    headers = ("process", "MiB before", "after", "descriptors before", "after", "threads before", "after")
    rows = []
    for name in dict.fromkeys((*before, *after)):
        pairs = [(table.get(name), what) for what in ("memory", "descriptors", "threads") for table in (before, after)]
        rows.append([name, *(NOTHING if row is None else _amount(row[what], what) for row, what in pairs)])
    return render(headers, rows)


def _amount(value: int, what: str) -> str:
    return str(value >> 20 if what == "memory" else value)


def stretch_table(stretch: Record) -> str:
    """What a server held, what was counted, and what was left."""
    end = stretch.get("end", {})
    idle = ", ".join(f"{name} {value:g}" for name, value in (stretch.get("idle") or {}).items())
    counted = ", ".join(f"{name} {value:.0f}" for name, value in (stretch.get("counted") or {}).items())
    left = [len(end.get("left", [])), len(end.get("shared_memory", [])), end.get("ray_actors", 0)]
    others = end.get("shared_memory_of_others", [])
    log = stretch.get("log", {})
    return "\n".join(
        [
            holdings_table(stretch),
            f"at the end: {idle}",
            f"counted: {counted}",
            f"ended with status {end.get('status')} in {end.get('seconds', 0):.1f} s; left afterwards: {left[0]} "
            f"processes, {left[1]} in shared memory, {left[2]} Ray actors; "
            f"log: {log.get('errors', 0)} errors, {log.get('tracebacks', 0)} tracebacks",
            *([f"new in shared memory, but nobody's and never seen with ours: {', '.join(others)}"] if others else []),
        ]
    )


def report_json(settings: Settings, accounts: Accounts, journal: Journal) -> dict[str, Any]:
    """Everything but the answers themselves. `tokens`: of all answers together."""
    stretches, faults = journal.of("stretch"), journal.of("fault")
    tokens = sum(len(choice[1]) for record in journal.of("answer") for choice in record.get("choices", ()))
    return {
        "schema": SCHEMA,
        "settings": settings.to_json(),
        "accounts": accounts.to_json(),
        "tokens": tokens,
        "usual_gaps_seconds": usual_gaps(stretches),
        "faults_done": dict(Counter(fault["kind"] for fault in faults)),
        "faults": faults,
        "stretches": stretches,
        "plain": journal.of("plain"),
    }
