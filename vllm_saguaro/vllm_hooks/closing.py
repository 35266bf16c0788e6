"""The end of a draft that is given up while requests run: it may take seconds, and no pass waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_PATIENCE = 30.0
"""Seconds that the worker's own end waits for it."""


class Closing:
    """A thread that closes what was given up, and whoever has to wait for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, close: Callable[[], None]) -> None:
        """Call `close` in a thread of its own, or here where none can be started; what it raises is logged."""

        def end() -> None:
            try:
                close()
            except Exception:
                logger.exception("Saguaro: closing the draft failed, too.")

        thread = threading.Thread(target=end, name="saguaro-draft-close", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # none can be started any more
            end()
        else:
            self._thread = thread

    def wait(self) -> None:
        """Until it is closed, or for half a minute; at once where nothing was given up."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                logger.warning("Saguaro: the draft that was given up does not end; it goes with the process.")
            self._thread = None
