"""A reading in words: the lines of the terminal's view and of the page's table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vllm_saguaro.cli.reading import Reading


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what it is about, the number first of all, and what else there is to say about it."""

    key: str
    name: str
    value: str
    more: str = ""
    share: float | None = None

    def to_json(self) -> dict[str, str | float | None]:
        """Plain values only."""
        return asdict(self)


def span(reading: Reading) -> str:
    """The time that a reading is about."""
    return "since the server's start" if reading.seconds is None else f"the last {reading.seconds:.1f} s"


def rows(reading: Reading) -> list[Row]:
    """All that a reading says, in the order in which it is read."""
    found = []
    if reading.tokens_per_second is not None:
        steps = f"{reading.steps_per_second or 0:.1f} steps/s"
        found.append(Row("speed", "speed", f"{reading.tokens_per_second:.1f} tokens/s", steps))
    misses = (f"{cause.replace('_', ' ')} {_of(n, reading.outcomes)}" for cause, n in reading.misses.items())
    return [
        *found,
        Row("requests", "requests", f"{reading.running} running", f"{reading.waiting} waiting"),
        Row("drafts", "drafts", f"{reading.drafts_up} up", _ends(reading)),
        Row("hit_rate", "hit rate", _percent(reading.hit_rate), f"of {reading.outcomes} outcomes", reading.hit_rate),
        Row("acceptance", "acceptance", _percent(reading.acceptance), "of the drafts verified", reading.acceptance),
        Row("by_position", "by position", " ".join(f"{share:.2f}" for share in reading.accepted_by_position) or "-"),
        Row("misses", "misses", ", ".join(misses)),
        Row("backups", "backups", ", ".join(f"{kind} {count}" for kind, count in reading.backups.items())),
        Row("late", "late tables", _percent(reading.late_share), "of the hits"),
        Row("quiet", "quiet steps", _percent(reading.quiet_share)),
        Row("chosen", "chosen now", _chosen(reading)),
        Row("draft_round", "draft round", _time(reading.draft_round)),
        Row("verify", "verify", _time(reading.verify)),
        Row(
            "waits",
            "target waits",
            _time(reading.target_wait),
            f"99 % below {_time(reading.target_wait_p99)}; for backups {_time(reading.backup_wait)}",
        ),
    ]


def _ends(reading: Reading) -> str:
    given_up = f"{reading.drafts_left_off} given up" if reading.drafts_left_off else ""
    return ", ".join(filter(None, (given_up, f"{reading.restarts} restarts" if reading.restarts else "")))


def _chosen(reading: Reading) -> str:
    c = "" if reading.chosen_c is None else f", C = {reading.chosen_c:.3g}"
    return f"K = {reading.chosen_k:g}, N = {reading.chosen_n:g}{c}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _of(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"
