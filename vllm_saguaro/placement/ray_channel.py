"""The draft side in a Ray actor, as the target side sees it.

Ray is spoken to by a small process of our own (`ray_placer`), and never by this one: a Ray driver takes over signals,
starts threads, and ends its process when the head of the cluster is gone, none of which a serving engine may be exposed
to. The placer says where Ray has put the actor; then this side listens, over passed memory on the same node and over
the network otherwise, and the placer hands the actor the invitation. From then on no Ray call is on the round path.

The placer ends with this process, in whatever way that ends, and what it asked Ray for ends with the placer.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from vllm_saguaro.messages import Proposals, Round, Stamp, Step, Table
from vllm_saguaro.placement.channel import DraftFailed, NoRoom, NotAdmitted
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel
from vllm_saguaro.placement.ray_folder import clear_folder, make_folder

START_TIMEOUT_SECONDS = 900.0
"""A cluster may have to make room first; loading and compiling a large draft takes minutes on a cold cache."""
_END_SECONDS = 5.0
"""Ray takes two or three to end an actor and, where it is ours, itself."""
_REASON_SECONDS = 5.0


@dataclass(frozen=True)
class RayDraft:
    """What Ray is asked for: which draft, with which resources, in which cluster. Plain values only."""

    module: str
    """Has `serve_invited(start)`, which the actor calls with `options`, the invitation and its cores; of a pool
    `open_pool(start)`."""
    options: Mapping[str, Any]
    cpus: Sequence[int]
    """Cores of this node that are the draft's, where it runs here."""
    num_cpus: int
    """Cores that Ray is asked for, and threads that the draft has on another node."""
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = None
    namespace: str | None = None
    address: str | None = None
    """Of the cluster; None: a local one is started, and stopped at the end."""
    daemon_cpus: Sequence[int] = ()
    """Cores that a local Ray's own processes may use; empty: those of this thread."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the draft's process gets, wherever it runs."""
    pool: str | None = None
    """Name of a draft pool in that cluster: joined, or started where it is not there. None: a draft for us alone."""
    engines: int = 1
    """How many engines a pool that we start has room for."""
    slots: int = 0
    """Requests that we may have in the pool."""
    linger: float = 30.0
    """Seconds after which a pool that we start ends without engines."""
    tells_that_it_waits: bool = True
    """Whether the log says so when there is no room for long. Of several drafts one is enough."""


def cluster_address(asked: str | None) -> str | None:
    """The cluster to use: the one asked for, the one that this process belongs to, the one in RAY_ADDRESS, or none."""
    if asked is not None:
        return asked
    ray = sys.modules.get("ray")  # never imported here
    if ray is not None and ray.is_initialized():
        return str(ray.get_runtime_context().gcs_address)
    return os.environ.get("RAY_ADDRESS") or None


class RayChannel:
    """Starts the placer at once; `wait_until_ready` returns when the draft's model is loaded."""

    def __init__(self, draft: RayDraft, shape: MailboxShape, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: the placer's (None: ours). Raises `OSError` where the system has no process left,
        `RuntimeError` where it has no thread.
        """
        self._shape = shape
        self._link: NetworkChannel | PassedMemoryChannel | None = None
        self._pid = 0
        self._over = self._closed = False
        self._trouble = "the process that speaks to Ray ended"
        self._refusal: NotAdmitted | None = None
        self._lacking: tuple[str, float] | None = None
        """What no node has free, and since when we know; None: there is room, or we do not know yet."""
        self._room_seconds = START_TIMEOUT_SECONDS
        self._closing = threading.Lock()
        self.shards: Sequence[range] = (range(shape.slots),)
        # A Ray of our own keeps its logs and sockets here.
        self._folder: str | None = None
        lock: int | None = None
        if draft.address is None:
            self._folder, lock = make_folder()
        variables = {
            **(os.environ if environment is None else environment),
            **({} if draft.address else _private_ray()),
        }
        try:
            self._placer = subprocess.Popen(
                [sys.executable, "-P", "-m", "vllm_saguaro.placement.ray_placer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=variables,
            )
        except BaseException:
            if self._folder is not None:
                clear_folder(self._folder)
            _close_descriptor(lock)
            raise
        assert self._placer.stdin is not None
        # Should this object be dropped without `close`, the end of the pipe still ends the placer.
        self._finalizer = weakref.finalize(self, _close_quietly, self._placer.stdin)
        self._give_up_folder = weakref.finalize(self, _close_descriptor, lock)
        self._thread = threading.Thread(
            target=_follow, args=(self._placer, weakref.ref(self)), name="saguaro-ray-watch", daemon=True
        )
        try:
            self._thread.start()
            self._say({"parent": os.getpid(), "folder": self._folder, "draft": asdict(draft)})
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the actor lives, or is still to come."""
        return not (self._over or self._closed) and (self._link is None or self._link.alive)

    @property
    def pid(self) -> int:
        """Process id of the actor, on its node; 0 while there is none."""
        return self._pid

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that the draft can hold."""
        return self._link.max_length if self._link is not None else 0

    @property
    def resident_bytes(self) -> int:
        """Memory that the actor has on this node; 0 where it is on another one."""
        return self._link.resident_bytes if self._link is not None and not self._closed else 0

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest step has waited that the draft has not taken."""
        return self._link.stalled_seconds if self._link is not None and self.alive else 0.0

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling that the draft told last."""
        return self._link.sampling_c if self._link is not None and self.alive else None

    def epoch(self, slot: int) -> int:
        """One actor, one life."""
        return int(self._link is not None and self.alive)

    def post(self, step: Step) -> bool:
        """Tell the draft side a step, once there is one."""
        return self._link is not None and self.alive and self._link.post(step)

    def read(self, slot: int) -> Table | None:
        """The table of a slot, as far as it is."""
        return self._link.read(slot) if self._link is not None and self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of a branch's drafts; it stays readable when the actor has ended."""
        return self._link.proposals(stamp, version, branch, depth) if self._link is not None else None

    def rounds(self) -> Sequence[Round]:
        """What the actor was busy with since the last call."""
        return self._link.rounds() if self._link is not None else []

    def lend(self) -> memoryview | None:
        """The mailbox, for a device, where the actor is on this node; None where it is not, or is still to come."""
        return self._link.lend() if isinstance(self._link, PassedMemoryChannel) else None

    def wait_for_room(self, seconds: float) -> None:
        """How long `wait_until_ready` waits for a node that has room; the rest takes as long as ever."""
        self._room_seconds = seconds

    def wait_until_ready(self) -> None:
        """Wait for Ray to place the actor, and for that to load its model.

        Raises `DraftFailed` when it does not, `NotAdmitted` where a pool does not take us, and `NoRoom` when no node
        has had room for `wait_for_room`: then it may be called again.
        """
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self._link is None:
            if self._closed:
                raise DraftFailed("the draft side was closed while it started")
            if self._over:
                raise DraftFailed(f"Ray could not start the draft: {self._trouble}")
            now, lacking = time.monotonic(), self._lacking
            if lacking is not None:
                what, since = lacking
                if now - since > self._room_seconds:
                    message = f"Ray had not placed the draft after {now - since:.0f} s: no node has {what} free"
                    raise NoRoom(message, what)
                deadline = now + START_TIMEOUT_SECONDS  # once there is room the actor still takes its time
            elif now > deadline:
                raise DraftFailed(f"Ray had not placed the draft after {START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.02)
        try:
            self._link.wait_until_ready()
        except DraftFailed:
            self._thread.join(_REASON_SECONDS)  # Ray knows more, a moment later
            if self._refusal is not None and not self._closed:
                raise self._refusal from None
            if self._over and not self._closed:
                raise DraftFailed(f"Ray could not start the draft: {self._trouble}") from None
            raise

    def close(self) -> None:
        """End the actor, and Ray where it was started for it."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if self._link is not None:
            self._link.close()
        self._finalizer()
        try:
            self._placer.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._placer.kill()  # what it owns in a cluster ends with it, and so does a Ray of its own
            self._placer.wait()
        if self._thread.ident is not None:
            self._thread.join(_REASON_SECONDS)
        elif self._placer.stdout is not None:
            self._placer.stdout.close()  # the thread would have done it
        if self._folder is not None:
            clear_folder(self._folder)
        self._give_up_folder()

    # ---- what the placer says ----------------------------------------------------------------------------------

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._placer.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended: `_follow` notices
            self._placer.stdin.write(json.dumps(message).encode() + b"\n")
            self._placer.stdin.flush()

    def _hear(self, said: Mapping[str, Any]) -> None:
        if said["event"] == "refused":
            self._refusal = NotAdmitted(str(said["reason"]), bool(said["disagrees"]))
        if said["event"] in ("ended", "refused"):
            self._end(str(said["reason"]))
            return
        if said["event"] in ("waits", "room"):
            self._lacking = (str(said["lacking"]), time.monotonic()) if said["event"] == "waits" else None
            return
        self._pid = int(said["pid"])
        with self._closing:
            if self._closed:
                return
            if self._shape.device_steps and not said["beside"]:
                self._end(
                    "the draft is on another node, and under Model Runner V2 the target's GPU reads its mailbox: "
                    "give Ray a GPU of this node"
                )
                self._finalizer()
                return
            try:
                link = (
                    PassedMemoryChannel(self._shape)
                    if said["beside"]
                    else NetworkChannel(str(said["address"]), self._shape)
                )
            except (OSError, ValueError, RuntimeError) as error:  # the last one: no thread is left
                self._end(f"no link can be opened: {error}")
                self._finalizer()
                return
            self._link = link
        self._say({"invitation": link.invitation.to_dict()})

    def _end(self, trouble: str | None = None) -> None:
        """Ray says that the actor has ended, or cannot say anything more: nobody comes over the link any more."""
        if trouble is not None:
            self._trouble = trouble
        self._over = True
        if self._link is not None:
            self._link.hang_up(self._trouble)


def _private_ray() -> dict[str, str]:
    """Environment of a Ray that is for nobody but us: on loopback, and behind a token that is written nowhere."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: then this node is 127.0.0.1
        "RAY_worker_niceness": "0",
        # While the target loads beside it a daemon may take long to answer; by default Ray gives up after 30 s.
        "RAY_agent_register_timeout_ms": "600000",
        "RAY_health_check_failure_threshold": "60",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _close_quietly(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # what was still to be flushed to a process that has ended
        pipe.close()


def _close_descriptor(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _follow(placer: subprocess.Popen[bytes], channel: weakref.ref[RayChannel]) -> None:
    """Take in what the placer says, until it has ended."""
    assert placer.stdout is not None
    with placer.stdout as lines:
        for line in lines:
            owner = channel()
            if owner is not None:
                owner._hear(json.loads(line))
            del owner
    placer.wait()
    owner = channel()
    if owner is not None:
        owner._end()
