"""How far a benchmark has come, for the person who waits for it."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """What a progress bar is told; this one keeps silent."""

    def begin(self, steps: int) -> None:
        """So many calls of `step` will follow."""

    def step(self, doing: str) -> None:
        """The step before this is done, and this begins."""

    def end(self) -> None:
        """All is done, or was given up."""


class ProgressBar(Progress):
    """A tqdm bar on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.pending = 0
        self.seen = True

    def begin(self, steps: int) -> None:
        """Show the bar."""
        self.pending = 0
        # In a log file, where every update is a new line, some are enough.
        self.seen = sys.stderr.isatty()
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=0.1 if self.seen else 5)

    def step(self, doing: str) -> None:
        """Move on, and name what is being done."""
        self.bar.update(self.pending)
        self.pending = 1
        self.bar.set_description(doing, refresh=self.seen)

    def end(self) -> None:
        """Take the bar away."""
        self.bar.update(self.pending)
        self.bar.set_description("done", refresh=self.seen)
        self.bar.close()


def say(text: str) -> None:
    """A line on standard error that does not run into the bar."""
    tqdm.write(text, file=sys.stderr)
