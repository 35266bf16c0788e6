"""What a report says of speed, by pair, engine, batch and temperature."""

from __future__ import annotations

from typing import Any

from vllm_saguaro.benchmark.counters import ACCEPTED, DRAFTS, HITS, MISSES, count

Json = dict[str, Any]
Cell = tuple[str, str, int, float]
"""pair, engine, batch, temperature"""


def speeds(sections: list[Json]) -> dict[Cell, Json]:
    """The answers of all orders "speed" but the warm-ups."""
    found: dict[Cell, Json] = {}
    for section in sections:
        of = section["of"]
        if of.get("order") == "speed" and not of.get("warm_up") and section["answer"]:
            found[of["pair"], of["mode"], of["batch"], of["temperature"]] = section["answer"]
    return found


def hit_costs(sections: list[Json]) -> dict[tuple[str, str, int], float]:
    """Microseconds of a hit, by pair, engine and batch."""
    return {
        (section["of"]["pair"], section["of"]["mode"], section["of"]["batch"]): section["answer"]["us"]
        for section in sections
        if section["of"].get("order") == "hit" and "us" in section["answer"]
    }


def rate(answer: Json | None) -> float | None:
    """Tokens a second."""
    return answer["tokens"] / answer["seconds"] if answer and answer["seconds"] else None


def ratio(mine: Json | None, other: Json | None) -> float | None:
    """How many times as fast one is as the other; None where one was not measured."""
    a, b = rate(mine), rate(other)
    return a / b if a is not None and b else None


def acceptance(answer: Json) -> float | None:
    """Accepted drafts a round of a request."""
    rounds = count(answer["counters"], DRAFTS)
    return count(answer["counters"], ACCEPTED) / rounds if rounds else None


def hit_rate(answer: Json) -> float | None:
    """Hits among the rounds that were looked up."""
    hits, misses = (count(answer["counters"], name) for name in (HITS, MISSES))
    return hits / (hits + misses) if hits + misses else None
