"""The placer's part in a draft pool: finds the pool in the cluster, or starts it, and brings the engine to it.

Which of several engines starts a pool is settled by Ray: a name is given once. The pool is not this process's own; it
goes on when this ends.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_saguaro.placement.ray_parent import LOOK_SECONDS, Ended, Parent, result
from vllm_saguaro.placement.ray_pool import PoolActor
from vllm_saguaro.placement.ray_room import bundle_of, lacking

logger = logging.getLogger("vllm_saguaro.ray")

NAMESPACE = "saguaro"
"""Where pools have their names, unless `ray_options` say otherwise: by default each Ray job has a namespace of its own,
in which no other engine would find them."""
_SPARE_CALLS = 32
"""Calls at once beyond one an engine: of those that wait for the pool to load, or are refused."""
_DOOR = "door"
"""The threads of the pool's actor that answer where it is, and do nothing else: however many engines wait for it to
load, one that asks this must not take it for silent."""
_BETWEEN_TRIES_SECONDS = 1.0
_ANSWER_SECONDS = 30.0
"""So long may a pool be silent that has a process."""
_GIVEN_UP_SECONDS = 120.0
"""From the first trouble on: then it is no pool that is about to be followed by another."""
_PATIENCE_SECONDS = 20.0
_KILLED = "ray.kill"
"""What Ray's message of an actor's end has where somebody asked for that end."""
_NOBODY = "Failed to look up actor"
"""What Ray's message has where an actor had the name when we asked for it, and not any more."""


class Room:
    """Whether the cluster has room for the pool, as the target side is told."""

    def __init__(self, wanted: Mapping[str, Any], say: Callable[..., None]) -> None:
        self._bundle, self._say = bundle_of(wanted), say
        self.waits = False

    def look(self, placed: bool | None) -> None:
        """Tell it what is new. `placed`: as `_is_placed`."""
        if placed is None or self.waits is not placed:
            return
        self.waits = not placed
        if self.waits:
            self._say(event="waits", lacking=lacking(self._bundle))
        else:
            self._say(event="room")


def draft_in_pool(wanted: Mapping[str, Any], parent: Parent, say: Callable[..., None]) -> None:
    """Join the pool that is `wanted` (`RayDraft`), and stay until either side has ended."""
    actor, node, pid = _find(wanted, parent, Room(wanted, say))
    beside = node == ray.get_runtime_context().get_node_id()
    where = "this node, over shared memory" if beside else f"another node ({node}), over the network"
    logger.info('Saguaro\'s draft pool "%s" runs in Ray on %s; process %d.', wanted["pool"], where, pid)
    say(event="placed", beside=beside, address=get_node_ip_address(), pid=pid)
    invitation = parent.message()["invitation"]
    answer = result(actor.draft_for.remote(_ask(wanted), invitation), parent)
    if "refused" in answer:
        say(event="refused", reason=answer["refused"], disagrees=answer["disagrees"])
    else:
        say(event="ended", reason=answer["ended"])


def _ask(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What this engine asks for, as a dict of `admission.Ask`."""
    engine = f"process {os.getppid()} at {get_node_ip_address()}"
    return {"engine": engine, "options": wanted["options"], "slots": wanted["slots"]}


def _find(wanted: Mapping[str, Any], parent: Parent, room: Room) -> tuple[Any, str, int]:
    """The pool's actor, its node, and its process. One that is about to end, or hangs, is waited out or ended."""
    trouble: Exception
    troubled_at: float | None = None
    silent_at: float | None = None
    while True:
        try:
            actor = _named(wanted)
            node, pid = _whereabouts(actor, wanted, parent, room)
            return actor, node, pid
        except Ended:
            # It would go on asking for room, and load a draft for nobody. Other engines that wait for it ask anew.
            if _is_placed(actor) is False:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    ray.kill(actor, no_restart=True)
            raise
        except (TimeoutError, ActorUnavailableError) as silence:
            now, trouble = time.monotonic(), silence
            silent_at = now if silent_at is None else silent_at
            if isinstance(silence, TimeoutError) or now - silent_at > _ANSWER_SECONDS:
                logger.warning('Saguaro\'s draft pool "%s" does not answer, and is ended.', wanted["pool"])
                with contextlib.suppress(Exception):  # it may have ended meanwhile
                    ray.kill(actor, no_restart=True)
                silent_at = None
        except (RayTaskError, RayActorError) as ending:
            now, trouble, silent_at = time.monotonic(), ending, None
            if room.waits and _KILLED in str(ending):  # by an engine that ended: there was no trouble with the pool
                troubled_at = now
        except ValueError as nobody:
            if _NOBODY not in str(nobody):
                raise
            now, trouble, silent_at = time.monotonic(), nobody, None
        troubled_at = now if troubled_at is None else troubled_at
        if now - troubled_at > _GIVEN_UP_SECONDS:
            raise trouble
        parent.check()
        time.sleep(_BETWEEN_TRIES_SECONDS)


def _named(wanted: Mapping[str, Any]) -> Any:
    """The actor of this name: the one that is there, else a new one."""
    here, draft = ray.get_runtime_context().get_node_id(), wanted["options"]
    spill = "_spill_on_unavailable"  # private to Ray: without it the actor waits for room on this node
    near: dict[str, Any] = (
        {spill: True} if spill in inspect.signature(NodeAffinitySchedulingStrategy).parameters else {}
    )
    options: dict[str, Any] = {
        "name": f"saguaro-pool-{wanted['pool']}",
        "namespace": wanted["namespace"] or NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": wanted["num_cpus"],
        "num_gpus": wanted["num_gpus"],
        "resources": wanted["resources"] or None,
        "max_restarts": 0,  # new links are needed: the engines start it again
        "max_task_retries": 0,
        "max_concurrency": wanted["engines"] + _SPARE_CALLS,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True, **near),
    }
    if wanted["runtime_env"]:
        options["runtime_env"] = wanted["runtime_env"]
    start = {
        "ask": {**_ask(wanted), "options": draft},
        "engines": wanted["engines"],
        "linger": wanted["linger"],
        "node": here,
        "cpus": wanted["cpus"],
        "threads": wanted["num_cpus"],
    }
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    actor = ray.remote(concurrency_groups={_DOOR: 1})(PoolActor).options(**options)
    return actor.remote(wanted["module"], start, wanted["variables"], niceness)


def _whereabouts(actor: Any, wanted: Mapping[str, Any], parent: Parent, room: Room) -> tuple[str, int]:
    """Where the pool is, once it is placed. Raises `TimeoutError` when one that is placed does not answer."""
    asked, waited, since_placed = actor.whereabouts.options(concurrency_group=_DOOR).remote(), 0.0, 0.0
    while True:
        try:
            node, pid = result(asked, parent, LOOK_SECONDS)
            room.look(True)
            return str(node), int(pid)
        except TimeoutError:
            placed = _is_placed(actor)
            room.look(placed)
            waited += LOOK_SECONDS
            since_placed += LOOK_SECONDS if placed else 0.0
            if since_placed > _ANSWER_SECONDS:
                raise
            if waited == _PATIENCE_SECONDS and not since_placed:
                needs = lacking(bundle_of(wanted))
                logger.warning("Saguaro's draft pool waits for a node of the Ray cluster that has %s free.", needs)


def _is_placed(actor: Any) -> bool | None:
    """Whether it has a process, as far as the cluster knows; None: it does not say, or the actor has ended."""
    from ray._private import state

    try:  # private to Ray: where it is another, a pool that does not answer is waited for
        known = state.actors(actor._actor_id.hex())["State"]
    except Exception:
        return None
    return {"ALIVE": True, "DEPENDENCIES_UNREADY": False, "PENDING_CREATION": False}.get(str(known))
