"""What is done to a draft side, kind by kind, each to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from scripts.faulting import link
from scripts.faulting.memory import starve
from scripts.faulting.nodes import Cluster
from scripts.faulting.settings import Kind
from scripts.faulting.standing import Watch
from scripts.soaking import faults, metrics, processes
from scripts.soaking.server import Server
from vllm_saguaro.cli.exposition import Snapshot

SLOW_SECONDS = 3.0
"""Shorter than what the engine takes for a hang."""
CUT_SECONDS = 30.0
"""So long may the draft of a link that is cut go on."""
LOOK_SECONDS = 0.1
_LINK_SECONDS = 5.0


class ImpossibleError(RuntimeError):
    """The fault cannot be done here; the message says why."""


@dataclass(frozen=True)
class Scene:
    """Where a fault is done. `cluster`: of Ray nodes, where the draft is in one of ours. `patience`: seconds.

    `watch`: tells where the time of a gap went.
    """

    server: Server
    cluster: Cluster | None
    session: aiohttp.ClientSession
    random: random.Random
    patience: float
    watch: Watch | None = None

    async def drafts(self) -> list[int]:
        """Process ids of the draft sides. Looked for beside the event loop, which has streams to read."""
        return await asyncio.to_thread(self.server.drafts if self.cluster is None else self.cluster.drafts)

    async def metrics(self) -> Snapshot:
        """The server's metrics now; empty where it does not answer."""
        return await metrics.look(self.session, self.server.url)


async def kill(scene: Scene, pid: int) -> str:
    """SIGKILL."""
    return await faults.kill(pid, scene.random)


async def hang(scene: Scene, pid: int) -> str:
    """SIGSTOP until it is ended."""
    return await faults.stop(pid, scene.random)


async def slow(scene: Scene, pid: int) -> str:
    """SIGSTOP, and SIGCONT after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(SLOW_SECONDS)
        finally:
            os.kill(pid, signal.SIGCONT)
    return f"SIGSTOP, SIGCONT after {SLOW_SECONDS:g} s"


async def oom(scene: Scene, pid: int) -> str:
    """No more memory."""
    return await starve(pid, scene.random)


async def cut(scene: Scene, pid: int) -> str:
    """Both ends of the link hear nothing any more, until the draft gives up."""
    ends = await _link(scene, pid)
    if ends is None:
        raise ImpossibleError("there is no link between the engine and its draft")
    begin = time.monotonic()
    try:
        for end in ends:
            link.silence(end)
    except OSError as error:
        raise ImpossibleError(f"the link's sockets cannot be taken hold of: {error}") from error
    while await asyncio.to_thread(_is_linked, pid, ends[0]) and time.monotonic() - begin < CUT_SECONDS:
        await asyncio.sleep(LOOK_SECONDS)
    return f"link silent both ways, given up by the draft after {time.monotonic() - begin:.1f} s"


async def node(scene: Scene, pid: int) -> str:
    """All processes of its node, at once; then another node joins."""
    cluster = scene.cluster
    lost = None if cluster is None else await asyncio.to_thread(cluster.node_of, pid)
    if cluster is None or lost is None:
        raise ImpossibleError("the draft is on no node of ours")
    count = await asyncio.to_thread(cluster.lose, lost)
    begin = time.monotonic()
    await asyncio.to_thread(cluster.join)
    return f"SIGKILL to all {count} processes of its node; another node {time.monotonic() - begin:.1f} s later"


async def dying(scene: Scene, pid: int) -> str:
    """Each draft as soon as it is there, until the engine starts no more."""
    begin, ended = time.monotonic(), 0
    while time.monotonic() - begin < scene.patience and scene.server.alive:
        for draft in await scene.drafts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(draft, signal.SIGKILL)
                ended += 1
            while processes.is_alive(draft):
                await asyncio.sleep(LOOK_SECONDS / 10)
        if (await scene.metrics()).total(metrics.DRAFT_LEFT_OFF):
            break
        await asyncio.sleep(LOOK_SECONDS)
    return f"SIGKILL, and to each of the {ended - 1} that were started after it"


async def _link(scene: Scene, pid: int) -> tuple[link.End, link.End] | None:
    deadline = time.monotonic() + _LINK_SECONDS
    while time.monotonic() < deadline:
        ends = await asyncio.to_thread(_find_link, scene.server, pid)
        if ends is not None:
            return ends
        await asyncio.sleep(LOOK_SECONDS)
    return None


def _find_link(server: Server, pid: int) -> tuple[link.End, link.End] | None:
    """Ray's own streams, to the process that speaks to it, are not the link."""
    others = [member for member in server.members() if processes.name_of(member) != "ray"]
    return link.between(pid, others)


def _is_linked(pid: int, end: link.End) -> bool:
    return end in link.streams_of(pid)


DEEDS: dict[Kind, Callable[[Scene, int], Awaitable[str]]] = {
    Kind.KILL: kill,
    Kind.HANG: hang,
    Kind.SLOW: slow,
    Kind.OOM: oom,
    Kind.CUT: cut,
    Kind.NODE: node,
    Kind.DYING: dying,
}
"""Does it to a draft process, returns when it is over, and says what was done. Raises `ImpossibleError`."""
