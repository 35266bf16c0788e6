"""A Ray cluster on this machine whose nodes can be lost: one for the engine, the others for the draft.

Each is a `ray start` of its own on a loopback address of its own (127.0.0.1, .2, .3, ...), as on separate machines.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from scripts.faulting.settings import FAR
from scripts.repository import ROOT
from scripts.soaking import processes
from scripts.soaking.server import free_port

_STARTED = "Ray runtime started."
_START_SECONDS = 120.0
_END_SECONDS = 20.0
_GONE_SECONDS = 5.0
_OBJECT_STORE_BYTES = 80 << 20
"""Nothing goes through it, and this is about the least that Ray takes."""
_COUNT_GROUPS = """
import json, sys
import ray
from ray.util import placement_group_table
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps([group["state"] for group in placement_group_table().values()]))
"""


class ClusterError(RuntimeError):
    """A node did not come up; the message holds the end of its log."""


class Node:
    """One `ray start`, the leader of a session, and all that it starts."""

    def __init__(self, folder: Path, number: int, arguments: list[str], environment: dict[str, str]) -> None:
        self.address = f"127.0.0.{number}"
        self._log = folder / f"node-{number}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", self.address, "--object-store-memory", str(_OBJECT_STORE_BYTES)]
        with self._log.open("w", encoding="utf-8") as log:
            file: IO[str] = log
            self._process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._seen: dict[int, int | None] = {}

    def wait_until_up(self) -> None:
        """Raises `ClusterError` when it does not come up."""
        deadline = time.monotonic() + _START_SECONDS
        while _STARTED not in self._log.read_text(encoding="utf-8", errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                end = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
                raise ClusterError(f"a Ray node at {self.address} did not come up\n--- end of its log\n{end}")
            time.sleep(0.1)

    def members(self) -> list[int]:
        """Its processes now. They are remembered, with when they began: an orphan is still known."""
        known = [pid for pid, begin in self._seen.items() if begin is not None and processes.start_time(pid) == begin]
        alive = filter(processes.is_alive, {*processes.session_members(self._process.pid), *known})
        found = [pid for pid in processes.with_descendants(alive) if processes.is_alive(pid)]
        for pid in found:
            self._seen.setdefault(pid, processes.start_time(pid))
        return found

    def kill(self) -> int:
        """End all of it at once, as a machine ends that loses its power; how many processes that were."""
        found = self.members()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _GONE_SECONDS
        while any(map(processes.is_alive, found)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return len(found)

    def end(self) -> None:
        """Ask it to end, wait a while, and end by force what is left."""
        self.members()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self.kill()


class Cluster:
    """The head, where the engine is, and one node for the draft at a time. To be closed."""

    def __init__(self) -> None:
        """Start both. Raises `ClusterError`."""
        self._folder = Path(tempfile.mkdtemp(prefix="saguaro-faults-"))
        self._environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._nodes: list[Node] = []
        self._numbers = itertools.count(1)
        try:
            head = ["--head", "--port", str(port), "--include-dashboard", "false", "--num-cpus", "1"]
            head += ["--ray-client-server-port", str(free_port()), "--temp-dir", str(self._folder)]
            self._add(head)
            self.join()
        except BaseException:
            self.close()
            raise

    def join(self) -> None:
        """Another node for drafts. Raises `ClusterError`."""
        self._add(["--address", self.address, "--num-cpus", "1", "--resources", json.dumps({FAR: 1})])

    def drafts(self) -> list[int]:
        """Process ids of the actors that draft."""
        return [
            pid for node in self._nodes for pid in node.members() if processes.is_draft(processes.command_line(pid))
        ]

    def node_of(self, pid: int) -> Node | None:
        """Where a process is."""
        return next((node for node in self._nodes if pid in node.members()), None)

    def lose(self, node: Node) -> int:
        """End a node; how many processes it had."""
        count = node.kill()
        self._nodes.remove(node)
        return count

    def actors(self) -> int:
        """Processes of actors, of whomever; the cluster is nobody else's."""
        return sum(
            processes.is_ray_actor(processes.command_line(pid)) for node in self._nodes for pid in node.members()
        )

    def placement_groups(self) -> int:
        """Placement groups that have not been given back."""
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_GROUPS, self.address],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=_START_SECONDS,
        )
        if done.returncode:
            raise ClusterError(f"the Ray cluster does not answer: {done.stderr[-2000:]}")
        states: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return sum(state != "REMOVED" for state in states)

    def close(self) -> None:
        """End all nodes, the head last."""
        while self._nodes:
            self._nodes.pop().end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, arguments: list[str]) -> None:
        node = Node(self._folder, next(self._numbers), arguments, self._environment)
        self._nodes.append(node)
        node.wait_until_up()
