"""A server for each placement, one fault after the other, and then plain vLLM for the texts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from scripts.faulting.compare import Texts, compare
from scripts.faulting.deeds import Scene
from scripts.faulting.episode import Episode, undergo, wait_for_hits
from scripts.faulting.nodes import Cluster
from scripts.faulting.settings import Serving, Settings
from scripts.faulting.standing import Watch
from scripts.faulting.streams import POOL, Pool, Streams, Told
from scripts.soaking import client, processes
from scripts.soaking.holdings import Sums, by_name
from scripts.soaking.server import End, Server, VllmServer
from scripts.soaking.stretch import quiet

SHORT_LIVED = ("draft", "ray")
"""Names of processes that end with a draft side: what they hold ends with them."""
_LOOK_SECONDS = 0.25
_GIVEN_BACK_SECONDS = 15.0

Say = Callable[[str], None]


@dataclass
class Run:
    """What one server went through, and what was left of it.

    `before`, `after`: what its processes held when nothing ran, before the first fault and after the last one.
    `actors_left`, `groups_left`: in a cluster of ours after the server's end. `warm`: whether there ever were hits.
    """

    placement: str
    episodes: list[Episode] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    warm: bool = False
    before: Sums = field(default_factory=dict)
    after: Sums = field(default_factory=dict)
    ended_by_itself: bool = False
    end: End | None = None
    actors_left: int = 0
    groups_left: int = 0

    @property
    def lost(self) -> list[Told]:
        """Requests that were lost, at any time."""
        return [each for each in self.told if each.lost]

    @property
    def descriptors_left(self) -> int:
        """File descriptors more than before the faults, in the processes that have outlived all of them."""
        return sum(
            max(0, self.after[name]["descriptors"] - row["descriptors"])
            for name, row in self.before.items()
            if name not in SHORT_LIVED and name in self.after
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "placement": self.placement,
            "requests": len(self.told),
            "lost": [f"request {each.answer.index}: {_why(each)}" for each in self.lost],
            "faults": [episode.to_json(self.told) for episode in self.episodes],
            "before": self.before,
            "after": self.after,
            "descriptors_left": self.descriptors_left,
            "ended_by_itself": self.ended_by_itself,
            "end": None if self.end is None else asdict(self.end),
            "actors_left": self.actors_left,
            "placement_groups_left": self.groups_left,
        }


async def measure(settings: Settings, logs: Path, say: Say) -> tuple[list[Run], Texts]:
    """All of it. `logs`: a folder for the servers' logs. Raises `ServerError` or `ClusterError`."""
    pool = Pool(settings)
    runs = [await _run(settings, placement, pool, logs, say) for placement in settings.placements]
    say("plain vLLM, for the texts")
    server = VllmServer(Serving(settings, "process"), plain=True, log=logs / "plain.log")
    try:
        await server.wait_until_up()
        async with client.open_session() as session:
            texts = await compare(session, server.url, pool, (each for run in runs for each in run.told), say)
        await asyncio.to_thread(server.end)
    finally:
        server.kill()
    return runs, texts


async def _run(settings: Settings, placement: str, pool: Pool, logs: Path, say: Say) -> Run:
    cluster = None
    if placement == "nodes":
        say("two Ray nodes")
        cluster = await asyncio.to_thread(Cluster)
    try:
        serving = Serving(settings, placement, None if cluster is None else cluster.address)
        log = logs / f"{placement}.log"
        say(f"{placement}: a server; its log is {log}")
        server = VllmServer(serving, plain=False, log=log)
        run = Run(placement)
        try:
            await server.wait_until_up()
            async with client.open_session() as session:
                await go_through(settings, run, server, cluster, session, pool, say)
            run.ended_by_itself = not server.alive
            run.end = await asyncio.to_thread(server.end)
            if cluster is not None:
                await asyncio.to_thread(_look_at_cluster, cluster, run)
        finally:
            server.kill()
        return run
    finally:
        if cluster is not None:
            await asyncio.to_thread(cluster.close)


async def go_through(
    settings: Settings,
    run: Run,
    server: Server,
    cluster: Cluster | None,
    session: aiohttp.ClientSession,
    pool: Pool,
    say: Say,
) -> None:
    """All faults of a placement, done to a server that is up. What is found goes into `run`."""
    streams = Streams(session, server, pool, settings.concurrency)
    run.told = streams.told
    scene = Scene(server, cluster, session, random.Random(f"{settings.seed}/faults"), settings.patience)
    await _beside(streams, lambda: _warm_up(scene, run))
    if not run.warm:
        return
    await quiet(session, server)
    run.before = by_name(await asyncio.to_thread(server.snapshot))

    async def faults() -> None:
        for kind in settings.kinds(run.placement):
            episode = await undergo(run.placement, kind, scene, streams, settings.seconds)
            run.episodes.append(episode)
            say(f"{run.placement}, {kind}: {episode.done}; {_outcome(episode, streams.told)}")
            if not server.alive:
                return

    with Watch(await asyncio.to_thread(_lasting, server)) as watch:
        scene = replace(scene, watch=watch)
        await _beside(streams, faults)
    await quiet(session, server)
    run.after = by_name(await asyncio.to_thread(server.snapshot))


def _lasting(server: Server) -> dict[str, int]:
    """Processes that outlive every draft side, by name."""
    named = ((processes.name_of(pid), pid) for pid in server.members())
    return {name: pid for name, pid in named if name not in (*SHORT_LIVED, "resource_tracker")}


async def _beside(streams: Streams, doing: Callable[[], Awaitable[None]]) -> None:
    """Something beside the streams, which come to their end after it."""
    asking = asyncio.create_task(streams.run())
    try:
        await doing()
    finally:
        streams.stop()
        await asking


async def _warm_up(scene: Scene, run: Run) -> None:
    """The whole pool once, and hits: what is compiled and cached once is no stall of a fault."""
    while len(run.told) < POOL and scene.server.alive and not any(each.lost for each in run.told):
        await asyncio.sleep(_LOOK_SECONDS)
    run.warm = await wait_for_hits(scene)


def _look_at_cluster(cluster: Cluster, run: Run) -> None:
    """Ray may take a moment to give back what the draft had. Raises `ClusterError` when it does not answer."""
    deadline = time.monotonic() + _GIVEN_BACK_SECONDS
    while (left := cluster.actors()) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    run.actors_left, run.groups_left = left, cluster.placement_groups()


def _why(told: Told) -> str:
    return told.answer.reason or told.answer.complaint or str(told.answer.fate)


def _outcome(episode: Episode, told: list[Told]) -> str:
    lost = sum(each.lost for each in episode.requests(told))
    gaps = f"longest gap {1e3 * episode.window.longest:.0f} ms (quiet: {1e3 * episode.quiet.longest:.0f} ms)"
    back = "hits did not return"
    if episode.left_off is not None:
        back = f"left off after {episode.left_off:.1f} s and {episode.restarts} restarts"
    elif episode.hits_back is not None:
        back = f"hits after {episode.hits_back:.1f} s, {episode.restarts} restarts"
    return f"{episode.in_flight} in flight, {lost} lost, {gaps}, {back}"
