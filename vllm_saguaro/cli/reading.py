"""What two moments of `/metrics` say about the time between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vllm_saguaro import counters
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.counters import Counter, Gauge, Histogram

GENERATED: Final = "vllm:generation_tokens_total"
RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
DRAFTED: Final = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS: Final = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED: Final = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_PER_POSITION: Final = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_MOST: Final = 0.99


def name_of(metric: Counter | Gauge | Histogram) -> str:
    """The name under which a server exports one of ours; a histogram's is that of its parts without `_bucket`."""
    return f"vllm:{metric.name}_total" if isinstance(metric, Counter) else f"vllm:{metric.name}"


@dataclass(frozen=True)
class Reading:
    """Rates and shares of a stretch of time; None where nothing happened. Times are seconds.

    `seconds` is None where the stretch goes back to the server's start: then there are no rates. `accepted_by_position`
    is the share of the rounds with drafts in which draft 1, 2, ... was accepted. `chosen_k`, `chosen_n` and `chosen_c`
    are gauges, as they are now, the mean of several engines; there is no C where no drafts are drawn. `target_wait_p99`
    is the upper bound of its bucket.
    """

    seconds: float | None
    tokens_per_second: float | None
    steps_per_second: float | None
    running: int
    waiting: int
    outcomes: int
    hit_rate: float | None
    late_share: float | None
    acceptance: float | None
    drafts_up: int
    drafts_left_off: int
    restarts: int
    chosen_k: float
    chosen_n: float
    chosen_c: float | None
    draft_round: float | None
    verify: float | None
    target_wait: float | None
    target_wait_p99: float | None
    backup_wait: float | None
    quiet_share: float | None
    misses: dict[str, int] = field(default_factory=dict)
    backups: dict[str, int] = field(default_factory=dict)
    accepted_by_position: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def uses_saguaro(snapshot: Snapshot) -> bool:
    """Whether the server has our metrics at all."""
    return name_of(counters.HITS) in snapshot


def read(now: Snapshot, before: Snapshot | None = None, seconds: float | None = None) -> Reading:
    """What happened between two moments, or since the server's start.

    A counter that is smaller than before means that the server has begun anew: then it, too, counts from the start.
    """
    if before is not None and _began_anew(now, before):
        before, seconds = None, None

    def grown(value: Callable[[Snapshot], float]) -> float:
        return value(now) - (value(before) if before is not None else 0.0)

    def count(name: str) -> float:
        return grown(lambda snapshot: snapshot.total(name))

    def counted(metric: Counter) -> float:
        return grown(lambda snapshot: snapshot.by(name_of(metric), metric.label_name).get(metric.label, 0.0))

    def mean(histogram: Histogram) -> float | None:
        return _share(count(f"{name_of(histogram)}_sum"), count(f"{name_of(histogram)}_count"))

    hits = count(name_of(counters.HITS))
    misses = {cause.value: int(counted(counter)) for cause, counter in counters.MISSES.items()}
    outcomes = hits + sum(misses.values())
    steps, rounds = count(f"{name_of(counters.VERIFY)}_count"), count(DRAFTED)
    quiet = count(name_of(counters.QUIET_STEPS))
    return Reading(
        seconds=seconds,
        tokens_per_second=_share(count(GENERATED), seconds),
        steps_per_second=_share(steps, seconds),
        running=int(now.total(RUNNING)),
        waiting=int(now.total(WAITING)),
        outcomes=int(outcomes),
        hit_rate=_share(hits, outcomes),
        late_share=_share(count(name_of(counters.LATE_TABLES)), hits),
        acceptance=_share(count(ACCEPTED), count(DRAFT_TOKENS)),
        drafts_up=int(now.total(name_of(counters.DRAFT_UP))),
        drafts_left_off=int(now.total(name_of(counters.DRAFT_LEFT_OFF))),
        restarts=int(count(name_of(counters.DRAFT_RESTARTS))),
        chosen_k=now.mean(name_of(counters.DRAFTS)),
        chosen_n=now.mean(name_of(counters.BRANCHES)),
        chosen_c=now.mean(c) if (c := name_of(counters.SAMPLING_C)) in now else None,
        draft_round=mean(counters.DRAFT_ROUND),
        verify=mean(counters.VERIFY),
        target_wait=mean(counters.TARGET_WAIT),
        target_wait_p99=_quantile(now, before, name_of(counters.TARGET_WAIT)),
        backup_wait=mean(counters.BACKUP_WAIT),
        quiet_share=_share(quiet, steps),
        misses=misses,
        backups={kind: int(counted(counter)) for kind, counter in counters.BACKUPS.items()},
        accepted_by_position=_by_position(now, before, rounds),
    )


def _began_anew(now: Snapshot, before: Snapshot) -> bool:
    """Any counter may tell: a new server may have overtaken the old one in some, if nobody looked for a while."""
    ours = [name_of(counter) for counter in counters.COUNTERS]
    counted = [*ours, *(f"{name_of(histogram)}_count" for histogram in counters.HISTOGRAMS)]
    return any(now.total(name) < before.total(name) for name in (GENERATED, DRAFTED, DRAFT_TOKENS, *counted))


def engines(snapshot: Snapshot) -> list[str]:
    """The engines of a server (its label `engine`), in order; usually one."""
    return snapshot.values(name_of(counters.HITS), "engine")


def _by_position(now: Snapshot, before: Snapshot | None, rounds: float) -> list[float]:
    if rounds <= 0:
        return []
    old = before.by(ACCEPTED_PER_POSITION, "position") if before is not None else {}
    new = now.by(ACCEPTED_PER_POSITION, "position")
    return [(new[key] - old.get(key, 0.0)) / rounds for key in sorted(new, key=int)]


def _quantile(now: Snapshot, before: Snapshot | None, histogram: str) -> float | None:
    """The bound below which 99 of 100 lie; None where there were none, or they lie above the last bound."""
    old = before.bins(histogram) if before is not None else {}
    grown = {bound: count - old.get(bound, 0.0) for bound, count in sorted(now.bins(histogram).items())}
    total = max(grown.values(), default=0.0)
    bound = next((bound for bound, count in grown.items() if count >= _MOST * total), None) if total > 0 else None
    return bound if bound is not None and bound < float("inf") else None


def _share(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
