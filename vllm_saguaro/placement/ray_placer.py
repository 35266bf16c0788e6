"""The process that speaks to Ray: `python -m vllm_saguaro.placement.ray_placer`, started by `ray_channel`.

Standard input: one line of JSON with what is wanted (`RayDraft`), and one with the invitation for the actor. Standard
output: one line when no node has room for the actor yet, one when there is room, one when the actor is there, and one
when it has ended. When standard input ends, or the parent does, the actor is killed and its placement group removed; so
is a Ray that was started here.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vllm_saguaro.placement.ray_actor import DraftActor
from vllm_saguaro.placement.ray_folder import clear_abandoned_folders, clear_folder
from vllm_saguaro.placement.ray_parent import LOOK_SECONDS, Ended, Parent, result
from vllm_saguaro.placement.ray_pool_placer import draft_in_pool
from vllm_saguaro.placement.ray_room import bundle_of, lacking

logger = logging.getLogger("vllm_saguaro.ray")

_OBJECT_STORE_BYTES = 80 << 20
"""Of a Ray of our own: nothing goes through it, and this is about the least that Ray takes."""
_ANSWER_SECONDS = 10.0
_PATIENCE_SECONDS = 20.0
"""After so long without room the log says what is waited for."""


def main() -> None:
    """Place the draft, and stay until either side has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us in order
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray and the actor may print; the parent reads nothing but our lines
    logging.basicConfig(format="%(levelname)s %(message)s")
    logger.setLevel(logging.INFO)
    parent = Parent(sys.stdin.buffer)

    def say(**message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    start: dict[str, Any] = {}
    try:
        start = parent.message()
        wanted = start["draft"]
        if wanted["pool"]:
            with _cluster(wanted, start["folder"]):
                draft_in_pool(wanted, parent, say)
            return
        with _cluster(wanted, start["folder"]), _actor(wanted, parent, say) as actor:
            node, pid = result(actor.whereabouts.remote(), parent)
            beside = node == ray.get_runtime_context().get_node_id()
            where = "this node, over shared memory" if beside else f"another node ({node}), over the network"
            logger.info("Saguaro's draft runs in Ray on %s; process %d.", where, pid)
            say(event="placed", beside=beside, address=get_node_ip_address(), pid=pid)
            invitation = parent.message()["invitation"]
            cpus = wanted["cpus"] if beside else []
            draft = {"options": wanted["options"], "invitation": invitation, "cpus": cpus}
            draft["threads"] = len(cpus) or wanted["num_cpus"]
            niceness = os.getpriority(os.PRIO_PROCESS, 0)
            drafting = actor.serve.remote(wanted["module"], draft, wanted["variables"], niceness)
            say(event="ended", reason=result(drafting, parent))
    except Ended:
        pass
    except Exception as error:  # whatever Ray raises, in one line for the parent; all of it in the log
        logger.error("Saguaro's draft in Ray has ended: %s", error)
        if start.get("folder") and not isinstance(error, RayTaskError):  # that one is the draft's own
            _tell_last_words(Path(start["folder"]))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        say(event="ended", reason=lines[-1] if lines else type(error).__name__)
    finally:
        if start.get("folder"):
            clear_folder(start["folder"])


@contextlib.contextmanager
def _cluster(wanted: Mapping[str, Any], folder: str | None) -> Iterator[None]:
    """Connection to the cluster that is named, or to one that lives as long as this."""
    options: dict[str, Any] = {"namespace": wanted["namespace"], "logging_level": logging.WARNING}
    own = wanted["daemon_cpus"] if wanted["address"] is None else wanted["cpus"]
    if own:  # this process was begun on what cores there were, the target's among them
        os.sched_setaffinity(0, own)
    if wanted["address"] is None:
        clear_abandoned_folders()
        options |= {
            "address": "local",
            "num_cpus": wanted["num_cpus"],
            "resources": wanted["resources"] or None,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    else:
        options["address"] = wanted["address"]
        _check_address(wanted["address"])
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _actor(wanted: Mapping[str, Any], parent: Parent, say: Callable[..., None]) -> Iterator[Any]:
    """The actor, in a placement group of its own: on this node where there is room, on another one otherwise."""
    bundle = bundle_of(wanted)
    if wanted["address"] is None:
        _check_room(bundle)
    here = ray.get_runtime_context().get_node_id()
    wish = "_soft_target_node_id"  # private to Ray, and there since 2.3: without it any node is as good
    near: dict[str, Any] = {wish: here} if wish in inspect.signature(placement_group).parameters else {}
    group = placement_group([bundle], strategy="STRICT_PACK", **near)
    try:
        _wait_for_room(group, bundle, parent, say, _PATIENCE_SECONDS if wanted["tells_that_it_waits"] else None)
        options: dict[str, Any] = {
            "num_cpus": wanted["num_cpus"],
            "num_gpus": wanted["num_gpus"],
            "resources": wanted["resources"] or None,
            "max_restarts": 0,  # a new life needs a new link: the target side starts it again
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        }
        if wanted["runtime_env"]:
            options["runtime_env"] = wanted["runtime_env"]
        actor = ray.remote(DraftActor).options(**options).remote()
        try:
            yield actor
        finally:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone
            remove_placement_group(group)


def _tell_last_words(folder: Path) -> None:
    """Why a Ray of our own may have ended: its logs are about to go with it."""
    for log in sorted(folder.glob("session_*/logs/*")):
        if log.name in ("dashboard_agent.log", "runtime_env_agent.log", "raylet.err", "raylet.out", "gcs_server.out"):
            lines = [line for line in log.read_text(errors="replace").splitlines() if "[state-dump]" not in line]
            logger.error("The last lines of Ray's %s:\n%s", log.name, "\n".join(lines[-8:]))


def _check_address(address: str) -> None:
    """Ray itself would try for minutes, and then end this process."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto": Ray knows where to look
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from None


def _check_room(bundle: Mapping[str, float]) -> None:
    """A Ray of our own has one node, and no more will come."""
    there = ray.cluster_resources()
    for name, amount in bundle.items():
        if there.get(name, 0.0) < amount:
            raise ValueError(f"ray_options asks for {amount:g} {name}, this machine has {there.get(name, 0.0):g}")


def _wait_for_room(
    group: PlacementGroup,
    bundle: Mapping[str, float],
    parent: Parent,
    say: Callable[..., None],
    patience: float | None,
) -> None:
    """`patience`: after so long the log says what is waited for; None: never."""
    waited = 0.0
    while not group.wait(LOOK_SECONDS):
        parent.check()
        if not waited:
            say(event="waits", lacking=lacking(bundle))
        waited += LOOK_SECONDS
        if waited == patience:
            logger.warning("Saguaro's draft waits for a node of the Ray cluster that has %s free.", lacking(bundle))
    say(event="room")


if __name__ == "__main__":
    main()
