"""The benchmark's side of a worker: starts it, asks it, and sees to it that it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark.checkout import CHECKOUT
from vllm_saguaro.benchmark.procfs import session_seconds

_PATIENCE = 30.0
"""Seconds a worker may take to end by itself."""
ANSWER_SECONDS = 3600.0
"""How long a worker may take to load an engine (it may have to fetch its files) or for one repetition."""


class WorkerError(RuntimeError):
    """A worker could not load its engine or run it; the message holds the end of its log."""


class WorkerHandle:
    """One worker process, the leader of its own session, so that all below it can be counted and ended."""

    def __init__(
        self, name: str, log: Path, module: str = "vllm_saguaro.benchmark.worker", offline: bool = True
    ) -> None:
        """`module`: what the process runs. `offline`: whether it must find all files of the models on this machine."""
        self.name = name
        self.log = log
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        if CHECKOUT is not None:  # it need not be installed
            path = (str(CHECKOUT), os.environ.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        with log.open("w", encoding="utf-8") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                start_new_session=True,
            )

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send one order and wait for its answer. A worker without one in ANSWER_SECONDS is ended.

        Raises WorkerError.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            self._signal(signal.SIGKILL)

        clock = threading.Timer(ANSWER_SECONDS, give_up)
        clock.daemon = True
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            clock.cancel()
        if too_late.is_set():
            raise WorkerError(
                f"{self.name}: no answer after {ANSWER_SECONDS / 60:.3g} minutes, so it was ended; does it hang? Ask "
                f"for fewer prompts or tokens where it is only slow\n--- end of its log\n{self._end_of_log()}"
            )
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error'].strip()}\n--- end of its log\n{self._end_of_log()}")
        return answer

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Awake inside the block, frozen after it.

        An engine that waits still wakes up: vLLM's process groups look around 1300 times a second. Eight parked engines
        would take a few percent of the core on which the ninth is measured. A stopped process takes nothing.
        """
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Processor seconds that the worker and its children have used."""
        return session_seconds(self.process.pid)

    def begin_close(self) -> None:
        """Tell it to end, and do not wait."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """Let it end by itself; after a while, end its whole session."""
        self.begin_close()
        try:
            self.process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def end_now(self) -> None:
        """End it in the middle of whatever it does, with all below it."""
        self._signal(signal.SIGKILL)
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and all below it, if it is still there."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _end_of_log(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""
