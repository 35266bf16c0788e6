"""A soak, or one sitting of it: whatever is still to be done, until it is done or time is up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from scripts.soaking.accounts import Accounts, examine, unanswered, unreferred
from scripts.soaking.faults import plan
from scripts.soaking.journal import Journal
from scripts.soaking.settings import Settings
from scripts.soaking.stretch import Say, Stretch, differing
from scripts.soaking.traffic import Traffic


async def sit(
    settings: Settings, journal: Journal, minutes: float | None, say: Say, compare_now: bool = False
) -> Accounts:
    """Go on with a soak: first all requests to saguaro, then those that can be compared to plain vLLM.

    `compare_now`: nothing more to saguaro this time; what has been answered is compared, though more is to come.
    Ctrl-C, SIGTERM or the end of `minutes` let what is in flight come to its end; a second Ctrl-C does not wait.
    """
    traffic, stop = Traffic(settings), asyncio.Event()
    stretch = Stretch(settings, traffic, journal, stop, say)
    logs = journal.path.with_suffix(".saguaro.log"), journal.path.with_suffix(".plain.log")
    with _stopping(stop, minutes, say):
        todo = unanswered(settings, journal)
        if todo and not compare_now:
            done = {record["number"] for record in journal.of("fault")}
            faults = [fault for fault in plan(settings) if fault.number not in done]
            say(f"{len(todo)} requests and {len(faults)} faults to saguaro; its log is {logs[0]}")
            await stretch.soak(logs[0], todo, faults)
        compare = unreferred(traffic, journal)
        ripe = compare_now or not unanswered(settings, journal)
        if ripe and not stop.is_set() and (compare or differing(traffic, journal)):
            say(f"{len(compare)} of the requests to plain vLLM; its log is {logs[1]}")
            await stretch.refer(logs[1], compare)
    return examine(settings, traffic, journal)


@contextlib.contextmanager
def _stopping(stop: asyncio.Event, minutes: float | None, say: Say) -> Iterator[None]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(why: str) -> None:
        if stop.is_set():
            task.cancel()
        else:
            say(f"{why}: what is in flight comes to its end")
            stop.set()

    timer = None if minutes is None else loop.call_later(60 * minutes, end, f"{minutes:g} minutes are over")
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, end, number.name)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for number in signals:
            loop.remove_signal_handler(number)
