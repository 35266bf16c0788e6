"""One fault from beginning to end: a quiet time, the fault, and what follows until hits are back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scripts.faulting.deeds import DEEDS, LOOK_SECONDS, ImpossibleError, Scene
from scripts.faulting.settings import Kind
from scripts.faulting.standing import Spent, to_json
from scripts.faulting.streams import Streams, Told
from scripts.soaking import metrics
from scripts.soaking.stalls import Window

AFTER_SECONDS = 3.0
"""The window of a fault goes on for so long after hits are back: what runs is told anew then."""


@dataclass
class Episode:
    """What a fault came to. Times in seconds from its beginning; None: it did not happen. `in_flight`: requests.

    `quiet` and `window`: when streams were watched, before and since, with the longest time between two pieces of one;
    `spent_quiet` and `spent`: where that went.
    `restarts`: how often the draft side was started again. `left_off`: when the engine said that it would not any more.
    """

    placement: str
    kind: Kind
    done: str
    in_flight: int
    quiet: Window
    window: Window
    hits_back: float | None = None
    draft_up: float | None = None
    left_off: float | None = None
    restarts: int = 0
    impossible: bool = False
    spent_quiet: dict[str, Spent] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)

    @property
    def recovered(self) -> bool:
        """Whether it ended as it must: hits are back, or no draft is started any more, where all of them died."""
        return (self.left_off if self.kind == Kind.DYING else self.hits_back) is not None

    def requests(self, told: Iterable[Told]) -> list[Told]:
        """Those that were in flight at some time of its window."""
        return [each for each in told if each.end > self.window.begin and each.begin < self.window.end]

    def to_json(self, told: Iterable[Told]) -> dict[str, Any]:
        """Plain values."""
        touched = self.requests(told)
        return {
            "placement": self.placement,
            "fault": str(self.kind),
            "done": self.done,
            "in_flight": self.in_flight,
            "requests_in_window": len(touched),
            "lost": sum(each.lost for each in touched),
            "quiet_seconds": round(self.quiet.end - self.quiet.begin, 2),
            "longest_gap_quiet": round(self.quiet.longest, 4),
            "window_seconds": round(self.window.end - self.window.begin, 2),
            "longest_gap": round(self.window.longest, 4),
            "spent_quiet": to_json(self.spent_quiet),
            "spent": to_json(self.spent),
            "draft_up": self.draft_up,
            "hits_back": self.hits_back,
            "left_off": self.left_off,
            "restarts": self.restarts,
            "recovered": self.recovered,
            "impossible": self.impossible,
        }


async def undergo(placement: str, kind: Kind, scene: Scene, streams: Streams, seconds: float) -> Episode:
    """Do a fault to a server that streams are asked of, after `seconds` of quiet; return when it is over."""
    quiet = streams.gaps.open(time.monotonic())
    await asyncio.sleep(seconds)
    quiet.end = time.monotonic()
    before = (await scene.metrics()).total(metrics.DRAFT_RESTARTS)
    drafts = await scene.drafts()
    begin = time.monotonic()
    episode = Episode(placement, kind, "", len(streams.in_flight), quiet, streams.gaps.open(begin))
    try:
        if not drafts:
            raise ImpossibleError("there is no draft process")
        episode.done = await DEEDS[kind](scene, drafts[0])
        await asyncio.sleep(2 * LOOK_SECONDS)  # what was looked up while it was being done is counted by now
        await _wait(episode, scene, begin, before)
        await asyncio.sleep(AFTER_SECONDS)
    except ImpossibleError as error:
        episode.done, episode.impossible = f"not done: {error}", True
    finally:
        episode.window.end = time.monotonic()
    if scene.watch is not None:
        episode.spent_quiet = scene.watch.spent(*quiet.longest_at)
        episode.spent = scene.watch.spent(*episode.window.longest_at)
    return episode


async def wait_for_hits(scene: Scene) -> bool:
    """Whether hits are counted before patience ends."""
    base: float | None = None
    deadline = time.monotonic() + scene.patience
    while time.monotonic() < deadline and scene.server.alive:
        snapshot = await scene.metrics()
        if snapshot:
            hits = snapshot.total(metrics.HITS)
            base = hits if base is None else base
            if hits > base:
                return True
        await asyncio.sleep(LOOK_SECONDS)
    return False


async def _wait(episode: Episode, scene: Scene, begin: float, restarts_before: float) -> None:
    """Until hits are back, or until there is no more hope of it."""
    base: float | None = None
    deadline = time.monotonic() + scene.patience
    while time.monotonic() < deadline and scene.server.alive:
        snapshot = await scene.metrics()
        if snapshot:
            passed = round(time.monotonic() - begin, 2)
            episode.restarts = round(snapshot.total(metrics.DRAFT_RESTARTS) - restarts_before)
            hits = snapshot.total(metrics.HITS)
            base = hits if base is None else base
            if snapshot.total(metrics.DRAFT_LEFT_OFF):
                episode.left_off = passed
                return
            if episode.draft_up is None and episode.restarts and snapshot.total(metrics.DRAFT_UP):
                episode.draft_up = passed
            if hits > base:
                episode.hits_back = passed
                return
        await asyncio.sleep(LOOK_SECONDS)
