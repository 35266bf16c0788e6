"""A process that answers in JSON lines, with a limit on how long an answer may take."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.repository import ROOT

_PATIENCE = 20.0
"""Seconds a process may take to end by itself."""


class ChildError(RuntimeError):
    """No answer: the process has ended or was too slow; the message is one line, with the end of its log."""


class Child:
    """`python -m MODULE ARGUMENTS...` from the project's folder; a context manager that ends it and all below it."""

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        paths = [str(ROOT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        self._log = log
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self._received = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=_PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def ask(self, order: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Send an order (None: it knows what to do) and wait for the answer; one with "error" is an answer, too."""
        assert self._process.stdin is not None
        if order is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.kill()
                raise ChildError(f"no answer in {seconds:.0f} s{self._end_of_log()}")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                self._process.wait()
                raise ChildError(f"the process ended (exit status {self._process.returncode}){self._end_of_log()}")
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _end_of_log(self, lines: int = 6) -> str:
        written = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "; its log ends: " + " | ".join(line.strip()[-200:] for line in written) if written else ""
