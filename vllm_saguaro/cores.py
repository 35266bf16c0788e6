"""Which CPU cores the target has and which the draft has. Standard library only: it runs before torch is imported.

On a CPU both sides are bound by memory and by their own threads' barriers. Sharing a core costs far more than
speculation wins, so the two sets are disjoint wherever there are two cores.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

DRAFT_SHARE = 8
"""One core in so many goes to the draft: it has a small fraction of the target's weights to read."""
_HIGHEST_CPU = 65535
_ENOUGH_CORES = 4
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_OURS = "VLLM_SAGUARO_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Disjoint sets of logical CPUs; both the same one where there is only one."""

    target: tuple[int, ...]
    draft: tuple[int, ...]
    bind_target: bool = True
    """Whether the target is ours to bind: not where the user has bound it with VLLM_CPU_OMP_THREADS_BIND."""
    ranks: tuple[tuple[int, ...], ...] = ()
    """The part of each rank of a tensor-parallel target, equally many cores each. Empty: one rank, or not ours."""
    ranks_a_node: int = 1
    """The most ranks of ours that share one memory node."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON."""
        return {
            "target": list(self.target),
            "draft": list(self.draft),
            "bind_target": self.bind_target,
            "ranks": [list(part) for part in self.ranks],
            "ranks_a_node": self.ranks_a_node,
        }

    def describe(self) -> str:
        """One line for the log."""
        target, draft = "|".join(map(format_cpus, self.ranks)) or format_cpus(self.target), format_cpus(self.draft)
        if not set(self.target) & set(self.draft):
            return f"target on cores {target}, draft on cores {draft}"
        if not self.ranks:
            return f"target and draft share core {draft}: with one core there is nothing to overlap on"
        return (
            f"target on cores {target}, and the draft shares {draft} with it: there is no core beyond one a rank, so "
            "drafting costs about what it saves"
        )


def plan_cores(
    allowed: Sequence[int],
    draft_cpus: str | None,
    target_cpus: Sequence[int] | None = None,
    reserved: int = 0,
    drafts: int = 1,
) -> CorePlan:
    """Divide the CPUs that this process may use.

    `draft_cpus` is the user's choice for the draft, like "2-3,6"; the target gets the rest. Without one the draft gets
    the last one in eight (at least one, and one for each of so many `drafts` if that leaves the target half), and
    before those `reserved` cores stay free for vLLM's other processes.
    `target_cpus`: what the user has bound the target to, if anything; it stays.
    Raises `ValueError` when the choice is not within `allowed` or leaves nothing.
    """
    cpus = tuple(sorted(allowed))
    if draft_cpus is not None:
        draft = parse_cpus(draft_cpus)
        if not set(draft) <= set(cpus):
            raise ValueError(
                f"draft_cpus {draft_cpus!r} names cores that are not allowed here: write some of {format_cpus(cpus)}"
            )
    elif target_cpus is not None:
        draft = tuple(cpu for cpu in cpus if cpu not in target_cpus) or cpus
    elif len(cpus) > 1:
        draft = cpus[-max(1, min(drafts, len(cpus) // 2), len(cpus) // DRAFT_SHARE) :]
    else:
        draft = cpus
    if target_cpus is not None:
        if draft_cpus is not None and set(draft) & set(target_cpus):
            raise ValueError(
                f"draft_cpus {draft_cpus!r} overlaps the cores that {_BINDING} gives to the target "
                f"({format_cpus(target_cpus)}): write other ones"
            )
        return CorePlan(tuple(target_cpus), draft, bind_target=False)
    target = tuple(cpu for cpu in cpus if cpu not in draft)
    target = target[: max(1, len(target) - reserved)]
    if not target and draft_cpus is not None and len(cpus) > 1:
        raise ValueError(f"draft_cpus {draft_cpus!r} leaves no core to the target: write fewer of {format_cpus(cpus)}")
    return CorePlan(target or cpus, draft)


def plan_ranks(nodes: Sequence[Sequence[int]], ranks: int, draft_cpus: str | None, reserved: int = 0) -> CorePlan:
    """Divide the CPUs of memory nodes among the ranks of a tensor-parallel target and the draft.

    Rank r is on node r modulo their number, and all have equally many cores: they wait for each other in every layer.
    The draft is beside rank 0, with which it talks: on the last one in eight of that node, or on `draft_cpus`. Without
    a core beyond one a rank it shares. `reserved` cores stay free where that leaves the ranks one each.
    Raises `ValueError` when the choice is not within the nodes or leaves a rank nothing.
    """
    used = [tuple(sorted(node)) for node in nodes[:ranks]]
    seats = [len(range(first, ranks, len(used))) for first in range(len(used))]
    everything = tuple(sorted(cpu for node in nodes for cpu in node))
    if draft_cpus is not None:
        draft = parse_cpus(draft_cpus)
        if not set(draft) <= set(everything):
            raise ValueError(
                f"draft_cpus {draft_cpus!r} names cores that are not allowed here: "
                f"write some of {format_cpus(everything)}"
            )
    else:
        draft = used[0][-max(1, min(len(used[0]) // DRAFT_SHARE, len(used[0]) - seats[0])) :]
    free = [tuple(cpu for cpu in node if cpu not in draft) for node in used]
    if any(len(cpus) < seat for cpus, seat in zip(free, seats, strict=True)):
        if draft_cpus is not None and len(everything) > ranks:
            raise ValueError(
                f"draft_cpus {draft_cpus!r} leaves no core each to the target's {ranks} ranks: "
                f"write fewer of {format_cpus(everything)}"
            )
        free = used
    each = max(1, min(len(cpus) // seat for cpus, seat in zip(free, seats, strict=True)))
    while each > 1 and len({*everything}.difference(draft)) - each * ranks < reserved:
        each -= 1
    parts = []
    for rank in range(ranks):
        cpus, first = free[rank % len(used)], rank // len(used) * each
        parts.append(tuple(cpus[at % len(cpus)] for at in range(first, first + each)))
    target = tuple(sorted({cpu for part in parts for cpu in part}))
    return CorePlan(target, draft, ranks=tuple(parts), ranks_a_node=max(seats))


def apply_in_frontend(
    draft_cpus: str | None, environment: MutableMapping[str, str] = os.environ, ranks: int = 1, drafts: int = 1
) -> CorePlan:
    """Decide before any worker process starts, and bind the workers that this process will start.

    A worker process sizes and binds its OpenMP threads from the environment before our code runs in it, so the target's
    cores must stand there; an engine inside this process is bound by the worker itself. What the user has written into
    VLLM_CPU_OMP_THREADS_BIND stays. `ranks`: of a tensor-parallel target; `drafts`: draft processes.
    Raises `ValueError` as the planners do.
    """
    undo_in_frontend(environment)  # an earlier engine's plan is not the user's word
    binding = environment.get(_BINDING) or "auto"
    if binding == "nobind":
        plan = plan_cores(allowed_cpus(), draft_cpus)
        return CorePlan(plan.target, plan.draft, bind_target=False)
    if binding != "auto":
        return plan_cores(allowed_cpus(), draft_cpus, parse_cpus(binding.replace("|", ",")))
    allowed = allowed_cpus()
    if ranks > 1:
        wished = set(parse_cpus(draft_cpus)) if draft_cpus is not None else set()
        nodes = [
            (*one_cpu_a_core([cpu for cpu in node if cpu not in wished]), *wished.intersection(node))
            for node in by_node(allowed)
        ]
        few = sum(map(len, nodes[:ranks])) < _ENOUGH_CORES
        plan = plan_ranks(nodes, ranks, draft_cpus, _reserved(environment, not few))
        environment[_BINDING] = environment[_OURS] = "|".join(map(format_cpus, plan.ranks))
        return plan
    if draft_cpus is None:
        cpus = one_cpu_a_core(one_node(allowed))
    else:
        chosen = plan_cores(allowed, draft_cpus)
        cpus = tuple(sorted({*one_cpu_a_core(one_node(chosen.target)), *chosen.draft}))
    reserved = _reserved(environment, len(cpus) >= _ENOUGH_CORES)
    plan = plan_cores(cpus, draft_cpus, reserved=reserved, drafts=drafts)
    environment[_BINDING] = environment[_OURS] = format_cpus(plan.target)
    return plan


def _reserved(environment: MutableMapping[str, str], enough: bool) -> int:
    """vLLM's own binding keeps a core free for the process of its scheduler, where there are enough."""
    return int(environment.get("VLLM_CPU_NUM_OF_RESERVED_CPU") or enough)


def undo_in_frontend(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take our binding back, so that a later engine of this process which does not ask for us finds nothing changed."""
    ours = environment.pop(_OURS, None)
    if ours is not None and environment.get(_BINDING) == ours:
        del environment[_BINDING]


def one_node(cpus: Sequence[int]) -> tuple[int, ...]:
    """Those of the CPUs that share a memory node with the first: the target's weights lie there."""
    return next(node for node in by_node(cpus) if min(cpus) in node)


def by_node(cpus: Sequence[int]) -> list[tuple[int, ...]]:
    """The CPUs by memory node; all in one where the system does not tell of each."""
    nodes = []
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")):
        listed = node.read_text().strip()
        members = parse_cpus(listed) if listed else ()
        nodes.append(tuple(cpu for cpu in sorted(cpus) if cpu in members))
    nodes = [node for node in nodes if node]
    known = {cpu for node in nodes for cpu in node}
    return nodes if known == set(cpus) else [tuple(sorted(cpus))]


def shared_out(cpus: Sequence[int], drafts: int) -> list[tuple[int, ...]]:
    """The CPUs of each of several drafts: equal parts that follow one another; where they are few, one each in turn."""
    if len(cpus) < drafts:
        return [(cpus[draft % len(cpus)],) for draft in range(drafts)]
    bounds = [len(cpus) * draft // drafts for draft in range(drafts + 1)]
    return [tuple(cpus[first:end]) for first, end in pairwise(bounds)]


def one_cpu_a_core(cpus: Sequence[int]) -> tuple[int, ...]:
    """The first allowed CPU of each physical core: two threads of one core share what they are bound by."""
    chosen: dict[str, int] = {}
    for cpu in sorted(cpus):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        chosen.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return tuple(sorted(chosen.values()))


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs in a list like "0,2-4". Raises `ValueError` for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ValueError(f"{text!r} is no list of cores: write for example 3 or 2-3,6")
        if int(high if dash else low) > _HIGHEST_CPU:
            raise ValueError(f"{text!r} names a core beyond {_HIGHEST_CPU}: write for example 3 or 2-3,6")
        found.update(range(int(low), int(high if dash else low) + 1))
    return tuple(sorted(found))


def format_cpus(cpus: Sequence[int]) -> str:
    """The shortest list that `parse_cpus` reads back."""
    parts: list[str] = []
    ordered = sorted(cpus)
    start = 0
    for i, cpu in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != cpu + 1:
            first = ordered[start]
            parts.append(str(first) if first == cpu else f"{first}-{cpu}")
            start = i + 1
    return ",".join(parts)


def allowed_cpus() -> tuple[int, ...]:
    """The CPUs that the calling thread may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def pin(cpus: Sequence[int]) -> None:
    """Keep the calling thread, and the threads that it will start, on these CPUs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


@contextlib.contextmanager
def born_on(cpus: Sequence[int]) -> Iterator[None]:
    """Processes that the calling thread starts inside may use these CPUs, too, from their first moment: they begin
    where there is room, which is there while the target has its own. Without CPUs nothing changes.

    A draft that binds itself once it runs has imported half of Python on the target's cores by then. The calling thread
    keeps the CPUs that it has: moved to others it would wait for them with Python's lock in its hands (neither the
    system call nor the start of a process lets go of it), and so would the target, for as long as they are busy.
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before.union(cpus))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def draft_environment(environment: dict[str, str], cpus: Sequence[int]) -> dict[str, str]:
    """The environment of a draft process: the parent's, without what bound the parent's OpenMP threads to its cores."""
    bound = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", _BINDING, _OURS)
    child = {name: value for name, value in environment.items() if name not in bound}
    child["OMP_NUM_THREADS"] = str(len(cpus))
    child[_BINDING] = "nobind"
    return child


def processor_flags() -> frozenset[str]:
    """What the processor says that it can do; empty where the system does not tell."""
    return frozenset(_of_processor("flags").split())


def processor_name() -> str:
    """What the processor calls itself; that of its kind where the system does not tell."""
    return _of_processor("model name") or platform.machine()


def _of_processor(name: str) -> str:
    """A line of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(name)), ":").partition(":")[2].strip()


def bf16_is_slow(flags: frozenset[str]) -> bool:
    """Whether this x86 processor emulates bfloat16: then float32 is about twice as fast."""
    return bool(flags) and not flags & {"amx_bf16", "avx512_bf16"}
