"""What was promised of speed, and whether a run has kept it."""

from __future__ import annotations

from typing import Any

from scripts.gpu_checking.cells import hit_costs, ratio, speeds
from scripts.gpu_checking.settings import GOAL_PAIR

Json = dict[str, Any]

FASTER = {"draft_model": 1.15, "plain": 2.5}
"""At least so many times as fast, on one GPU, at batch 1, with the pair `GOAL_PAIR`."""
LARGE_BATCH = 64
"""Never slower than either at this batch, with any pair."""
HIT_MICROSECONDS = 60.0
"""A hit costs the target's stream less, on one GPU."""


def goals(sections: list[Json], settings: Json) -> list[Json]:
    """All goals of a run: `found` is None where it was not measured, `met` also where a CPU's times say nothing.

    Saguaro stands for `placement: stream` here: another GPU has no goal of its own.
    """
    judged = settings["device"] != "cpu"
    cells, costs = speeds(sections), hit_costs(sections)
    found: list[Json] = []

    def add(goal: str, sign: str, wanted: float, value: float | None) -> None:
        rounded, met = None, None
        if value is not None:
            rounded = round(value, 3)
            if judged:
                met = value >= wanted if sign == ">=" else value < wanted
        found.append({"goal": goal, "wanted": f"{sign} {wanted:g}", "found": rounded, "met": met})

    for pair in (settings["pair"], *settings["also"]):
        for batch, least in ((1, FASTER), (LARGE_BATCH, dict.fromkeys(FASTER, 1.0))):
            if batch == 1 and judged and pair != GOAL_PAIR:
                continue
            for t in settings["temperatures"]:
                mine = cells.get((pair, "saguaro", batch, t))
                for other, wanted in least.items():
                    value = ratio(mine, cells.get((pair, other, batch, t)))
                    add(f"{pair}, batch {batch}, T = {t:g}: saguaro / {other}", ">=", wanted, value)
        for batch in settings["few_batches"]:
            microseconds = costs.get((pair, "saguaro", batch))
            add(f"{pair}, batch {batch}: GPU time of a hit [us]", "<", HIT_MICROSECONDS, microseconds)
    return found
