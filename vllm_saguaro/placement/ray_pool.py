"""The Ray actor that holds a draft pool. It is detached: it belongs to no engine, and ends itself.

Nothing heavy is imported before its drafting thread is on its cores.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_saguaro.placement.pool import DraftPool, Place

logger = logging.getLogger("vllm_saguaro.ray")

_LAST_WORDS_SECONDS = 2.0
"""For answers that are on their way when the actor ends itself."""
_HANGS_SECONDS = 160.0
"""So long in one forward, with an engine at the door: that is a hang (see `Care.longest_hang`). The pool ends, and is
followed by another one. An engine comes again to a pool that it knows when a step of it was left unread for long."""


class PoolActor:
    """Engines join and leave it by one call each, which is as long as the engine's link."""

    def __init__(self, module: str, start: Mapping[str, Any], variables: Mapping[str, str], niceness: int) -> None:
        """`module` has `open_pool(start)`. `start`: as that wants it, and `node`, the one whose `cpus` are meant.

        `variables`: added to the environment, where they are not there already. `niceness`: the first engine's.
        """
        import ray

        with contextlib.suppress(OSError):  # on another node, or as another user, it may not be ours to lower
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        context = ray.get_runtime_context()
        self._node, self._handle = context.get_node_id(), context.current_actor
        cpus = list(start["cpus"]) if self._node == start["node"] else []
        self._start = {**start, "cpus": cpus, "threads": len(cpus) or start["threads"]}
        self._pool: DraftPool | None = None
        self._trouble = ""
        self._loaded = threading.Event()
        threading.Thread(target=self._draft, args=(module,), name="saguaro-pool", daemon=True).start()

    def whereabouts(self) -> tuple[str, int]:
        """Ray's id of the node, and the process id there. Raises `RuntimeError` where the pool is about to end."""
        if self._trouble or not (self._pool is None or self._pool.touch()):
            raise RuntimeError(self._trouble or "the pool is ending")
        return self._node, os.getpid()

    def draft_for(self, ask: Mapping[str, Any], invitation: Mapping[str, Any]) -> dict[str, Any]:
        """Draft for the engine that asks, as long as its link lives: `ended`, the reason; or `refused`, why, and
        whether its settings disagree. Raises `RuntimeError` when the draft could not be loaded.
        """
        from vllm_saguaro.placement.admission import Ask, check_agreement
        from vllm_saguaro.placement.channel import NotAdmitted

        asked = Ask(**ask)
        try:
            check_agreement(asked, Ask(**self._start["ask"]))  # before it is loaded: that takes long
            pool = self._loaded_pool()
            place = pool.admit(asked)
        except NotAdmitted as refusal:
            self._end_if_it_hangs()  # places are not given back while it does, so nobody might ever come in
            return {"refused": str(refusal), "disagrees": refusal.disagrees}
        return {"ended": self._serve(pool, place, invitation)}

    def _serve(self, pool: DraftPool, place: Place, invitation: Mapping[str, Any]) -> str:
        from vllm_saguaro.placement.arrival import come
        from vllm_saguaro.placement.meeting import Invitation

        try:
            end = come(Invitation.from_dict(invitation))
        except Exception as error:  # whatever it is, its place is for others now
            pool.give_up(place, str(error))
            return place.reason
        pool.bring(place, end)
        while not place.ended.wait(1.0):
            if not pool.has_begun(place):
                self._end_if_it_hangs()
        return place.reason

    def _end_if_it_hangs(self) -> None:
        if self._pool is not None and self._pool.silent_seconds > _HANGS_SECONDS:
            logger.error("Saguaro's draft pool hangs, and ends itself.")
            os._exit(1)

    def _loaded_pool(self) -> DraftPool:
        self._loaded.wait()
        if self._pool is None:
            raise RuntimeError(self._trouble)
        return self._pool

    def _draft(self, module: str) -> None:
        """The drafting thread, from loading to the end of this process."""
        try:
            self._pool = importlib.import_module(module).open_pool(self._start)
            self._loaded.set()
            self._pool.run()
        except BaseException as error:  # whatever it is, engines wait to hear of it
            logger.exception("Saguaro's draft pool has ended.")
            self._trouble, self._pool = str(error) or type(error).__name__, None
            self._loaded.set()
        time.sleep(_LAST_WORDS_SECONDS)
        self._exit()

    def _exit(self) -> None:
        """Let Ray know that this end was meant, so that it does not look for a fault."""
        import ray

        with contextlib.suppress(Exception):  # without a cluster there is nobody to tell
            ray.kill(self._handle, no_restart=True)
            time.sleep(_LAST_WORDS_SECONDS)
        os._exit(0)
