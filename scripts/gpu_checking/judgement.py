"""What must be true of an engine's answers; each function gives complaints, one line each, none if all is well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.gpu_checking.texts import SURPRISE, differences, surprises
from vllm_saguaro.benchmark.counters import ACCEPTED, DRAFTS, HITS, count

Json = dict[str, Any]

_V2 = ("vllm.v1.worker.gpu.", "vllm.v1.worker.cpu.")
_MIB = 1 << 20
_GROWTH = 512 * _MIB
_SLACK = 1024 * _MIB
"""Beyond `gpu_memory_utilization`: what CUDA itself and the graphs take, vLLM counts neither in full."""


def started(answer: Json) -> list[str]:
    """The engine runs on model runner V2."""
    if not answer["runner"].startswith(_V2):
        return [f"the model runner is {answer['runner']}, not V2"]
    return []


def speed(answer: Json, mode: str) -> list[str]:
    """Drafts are there and some are accepted; how fast it was is for `goals.py`."""
    if mode == "plain":
        return []
    wrong = []
    if count(answer["counters"], DRAFTS) == 0:
        wrong.append("there were no drafts")
    elif count(answer["counters"], ACCEPTED) == 0:
        wrong.append("no draft was accepted")
    if mode.startswith("saguaro") and count(answer["counters"], HITS) == 0:
        wrong.append("no outcome had been drafted for")
    return wrong


def no_sync(answer: Json) -> list[str]:
    """`propose` was called and never waited for the device, nor did the plugin anywhere else while it served."""
    if not answer["calls"]:
        return ["propose was never called"]
    wrong = [f"propose waits for the device at {', '.join(answer['waits'])}"] if answer["waits"] else []
    if answer["outside"]:
        wrong.append(f"the plugin waits for the device outside of propose at {', '.join(answer['outside'])}")
    return wrong


def hit(answer: Json) -> list[str]:
    """The cost of a round was measured; how much it was is for `goals.py`."""
    if answer["rounds"]:
        return []
    late = f": of {answer['late']} the device had begun too early" if answer["late"] else ""
    return [f"no round was timed{late}"]


def graphs(answer: Json) -> list[str]:
    """All graphs of the draft were captured."""
    if answer["captured"] != answer["expected"]:
        return [f"{answer['captured']} graphs were captured, not {answer['expected']}"]
    return []


def memory(answer: Json) -> list[str]:
    """The draft owns up to what it holds, and serving takes no more than was allowed."""
    wrong = []
    if answer["resident"] < answer["weights_and_kv"]:
        wrong.append(f"the draft says {_mib(answer['resident'])}, and holds {_mib(answer['weights_and_kv'])}")
    if answer.get("grown", 0) > _GROWTH:
        wrong.append(f"serving took {_mib(answer['grown'])} more")
    if "used" in answer and answer["used"] > answer["allowed"] + _SLACK:
        wrong.append(f"{_mib(answer['used'])} are used, {_mib(answer['allowed'])} were allowed")
    return wrong


def timeline(answer: Json) -> list[str]:
    """The draft works on a stream of its own, and while the target works."""
    if answer["hidden"] is None:
        return ["all work was on one stream"]
    return ["nothing of the draft's work was done while the target's was"] if answer["hidden"] <= 0 else []


def goals(found: list[Json]) -> tuple[list[str], str]:
    """(complaints, in short): goals of speed that were missed. What was not measured is no complaint."""
    met = [each["met"] for each in found]
    wrong = [f"{each['goal']}: {each['found']}, not {each['wanted']}" for each in found if each["met"] is False]
    return wrong, f"{met.count(True)} met, {met.count(None)} not judged"


def texts(plain: Json, other: Json, tie: float) -> tuple[list[str], str]:
    """(complaints, in short): greedy texts are plain vLLM's."""
    equal, wrong = differences(plain["token_ids"], plain["gaps"], other["token_ids"], tie)
    rest = len(plain["token_ids"]) - equal - len(wrong)
    return wrong, f"{equal} of {len(plain['token_ids'])} texts equal, {rest} apart at a near tie"


def samples(plain: Json, other: Json) -> tuple[list[str], str]:
    """(complaints, in short): samples have plain vLLM's distribution."""
    found = surprises(plain["token_ids"], other["token_ids"])
    wrong = [f"token {place}: {z:.1f} standard deviations" for place, z in enumerate(found) if z > SURPRISE]
    return wrong, f"{len(plain['token_ids'])} texts, at most {max(found, default=0.0):.1f} standard deviations apart"


ALONE: dict[str, Callable[[Json], list[str]]] = {
    "no_sync": no_sync,
    "hit": hit,
    "graphs": graphs,
    "memory": memory,
    "timeline": timeline,
}
"""Orders that are judged by their own answer."""


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"
