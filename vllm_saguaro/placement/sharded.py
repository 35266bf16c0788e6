"""Several drafts behind one channel, each with requests of its own.

A request stays with the draft whose slot it got (`slots.py` picks the one with the fewest requests), since its KV is
there. Every mailbox has room for all slots, so no stamp has to be translated; pages of slots that are another's are
never touched.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence

from vllm_saguaro.messages import Proposals, Stamp, Step, Table
from vllm_saguaro.placement.channel import Channel, DraftFailed, NoRoom, Placed

_ROOM_SECONDS = 10.0
"""The engine waits no longer than so for room for another draft once it has one: a cluster needs a moment to find room
that is there, and minutes or hours to get more."""


class ShardedChannel:
    """The slots 0 .. S - 1 shared out among the drafts, in equal parts that follow one another."""

    def __init__(self, channels: Sequence[Channel], slots: int, log: logging.Logger) -> None:
        """`channels`: of which each can hold all `slots` slots. Raises ValueError for more drafts than slots."""
        if not 0 < len(channels) <= slots:
            raise ValueError(f"{len(channels)} drafts cannot share {slots} slots")
        self._channels = tuple(channels)
        self._log = log
        bounds = [slots * shard // len(channels) for shard in range(len(channels) + 1)]
        self.shards: Sequence[range] = tuple(map(range, bounds, bounds[1:]))
        self._of_slot = tuple(channel for channel, own in zip(channels, self.shards, strict=True) for _ in own)

    @property
    def max_length(self) -> int:
        """Longest text, in tokens, that every draft can hold that came up."""
        return min((length for channel in self._channels if (length := channel.max_length)), default=0)

    @property
    def alive(self) -> bool:
        """Whether any draft can answer."""
        return any(channel.alive for channel in self._channels)

    @property
    def resident_bytes(self) -> int:
        """Memory of all drafts."""
        return sum(channel.resident_bytes for channel in self._channels)

    @property
    def stalled_seconds(self) -> float:
        """Of the draft that has left a step unread for longest."""
        return max(channel.stalled_seconds for channel in self._channels)

    @property
    def sampling_c(self) -> float | None:
        """The mean over the drafts that have one: each chooses its own."""
        found = [c for channel in self._channels if (c := channel.sampling_c) is not None]
        return sum(found) / len(found) if found else None

    def epoch(self, slot: int) -> int:
        """Which life of the slot's draft answers."""
        return self._of_slot[slot].epoch(slot)

    def post(self, step: Step) -> bool:
        """Tell each draft its part. False when any of them could not take it: the others have taken theirs.

        Who has to know which one it was posts a step for the slots of one draft alone.
        """
        taken = True
        for channel, own in zip(self._channels, self.shards, strict=True):
            part = step.part(own)
            if part and not channel.post(part):
                # A draft that has ended holds nothing: where it was only told to release, nothing is missed.
                taken = taken and not (channel.alive or part.admits or part.wants or part.outcomes)
        return taken

    def read(self, slot: int) -> Table | None:
        """The table of a slot."""
        return self._of_slot[slot].read(slot)

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        """The q of a branch's drafts."""
        return self._of_slot[stamp.slot].proposals(stamp, version, branch, depth)

    def wait_until_ready(self) -> None:
        """Wait for all drafts at once, and go on with those that came up; raises `DraftFailed` when none did.

        A draft that has failed is ended. One for which there is no room may come later, so it is left asking; it is not
        waited for once another one is up. One that loads is.
        """
        total = len(self._channels)
        ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        for at in range(total):
            threading.Thread(target=self._wait_for, args=(at, ended), name="saguaro-draft-wait", daemon=True).start()
        failures: dict[int, DraftFailed] = {}
        for _ in range(total):
            at, failure = ended.get()
            if failure is None:
                for channel in self._channels:
                    if isinstance(channel, Placed):
                        channel.wait_for_room(_ROOM_SECONDS)
            elif not isinstance(failure, DraftFailed):
                raise failure
            else:
                failures[at] = failure
                if not isinstance(failure, NoRoom):
                    self._log.warning("Draft %d of %d did not come up: %s.", at + 1, total, failure)
                    self._channels[at].close()
        if len(failures) == total:
            raise failures[0]
        lacking = [failure.lacking for failure in failures.values() if isinstance(failure, NoRoom)]
        if lacking:
            self._log.warning(
                "Going on with %d of %d drafts: no node of the Ray cluster has %s free. More come as soon as there is "
                "room.",
                total - len(failures),
                total,
                lacking[0],
            )
        elif failures:
            self._log.warning("Going on with %d of %d drafts.", total - len(failures), total)

    def _wait_for(self, at: int, ended: queue.SimpleQueue[tuple[int, BaseException | None]]) -> None:
        try:
            self._channels[at].wait_until_ready()
        except BaseException as failure:  # the thread that waits for all of them raises it
            ended.put((at, failure))
        else:
            ended.put((at, None))

    def close(self) -> None:
        """End all drafts at once: one may take seconds, and the engine has few. What one raises is raised at last."""
        failures: list[BaseException] = []

        def end(channel: Channel) -> None:
            try:
                channel.close()
            except BaseException as failure:
                failures.append(failure)

        ending = []
        for channel in self._channels[1:]:
            thread = threading.Thread(target=end, args=(channel,), name="saguaro-draft-close")
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending, and starts none any more
                end(channel)
            else:
                ending.append(thread)
        end(self._channels[0])
        for thread in ending:
            thread.join()
        if failures:
            raise failures[0]
