"""A server with a draft process that it starts again, as vLLM with saguaro does; for the table of faults."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from tests.unit.scripts.soak_server import SoakServer

BACK_OFF_SECONDS = 0.1


class FaultedServer(SoakServer):
    """Its draft is a sleeping process. `restarts`: how often it is started again before it is left off.

    `hang_seconds`: a stopped draft is ended after so long. `comes_back`: whether hits are ever counted again.
    """

    def __init__(self, restarts: int = 3, hang_seconds: float = 0.3, comes_back: bool = True) -> None:
        super().__init__()
        self.piece_seconds = 0.002
        self.restarts, self.hang_seconds, self.comes_back = restarts, hang_seconds, comes_back
        self.restarted = 0
        self.left_off = False
        self._draft = self._start()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_after, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def tended(self) -> Iterator[FaultedServer]:
        try:
            yield self
        finally:
            self._closed.set()
            self._thread.join()
            self._draft.kill()
            self._draft.wait()

    def drafts(self) -> list[int]:
        return [self._draft.pid] if self._draft.poll() is None else []

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def _look_after(self) -> None:
        stopped_at: float | None = None
        while not self._closed.wait(0.02):
            if self._draft.poll() is not None:
                stopped_at = None
                if self.restarted == self.restarts:
                    self.left_off = True
                    continue
                time.sleep(BACK_OFF_SECONDS)
                self.restarted += 1
                self._draft = self._start()
            elif self._state() != "T":
                stopped_at = None
            elif stopped_at is None:
                stopped_at = time.monotonic()
            elif time.monotonic() - stopped_at > self.hang_seconds:
                self._draft.kill()

    def _state(self) -> str:
        try:
            with open(f"/proc/{self._draft.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    async def _metrics(self, request: web.Request) -> web.Response:
        usual: Any = await super()._metrics(request)
        hits = self._hits if self.comes_back or not self.restarted else 0
        text = re.sub(r"(?m)^vllm:saguaro_hits_total.*$", f"vllm:saguaro_hits_total {hits}", usual.text)
        text += (
            f"vllm:saguaro_draft_restarts_total {self.restarted}\nvllm:saguaro_draft_left_off {int(self.left_off)}\n"
        )
        return web.Response(text=text)
