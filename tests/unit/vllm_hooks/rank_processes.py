"""Processes that meet as ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answers_of_ranks(size: int, rank: Callable[[int, str, Any], None], folder: Path, seconds: float) -> list[Any]:
    """What `rank`(number, file to meet at, queue) has put into the queue, once in each of `size` new processes."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=rank, args=(number, str(folder / "meet"), answers)) for number in range(size)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=seconds) for _ in processes]
    for process in processes:
        process.join(60)
    return found
