"""Which request has which slot, shared out among the draft sides behind one channel."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_saguaro.messages import Release, Stamp
from vllm_saguaro.placement.channel import Channel

_LONGEST_REST = 63
"""Posts without learning anew, at most, for a draft side that refuses what it is told: it hangs, or is far behind."""


@dataclass(slots=True)
class Shard:
    """The slots of one draft side, and how it takes what it is told."""

    slots: range
    free: list[int]
    epoch: int
    """As of the last look."""
    unheard: list[Release] = field(default_factory=list)
    """What it has not heard yet, and is to be told again."""
    refused: bool = False
    """Whether it did not take what it was told last."""
    rest: int = 0
    """Posts to come in which it learns nothing anew."""
    refusals: int = 0
    """In a row."""

    @property
    def has_room(self) -> bool:
        """Whether its draft side is there and has a slot to give."""
        return bool(self.epoch and self.free)

    @property
    def load(self) -> int:
        """How many requests it has."""
        return len(self.slots) - len(self.free)

    def took(self, anything: bool) -> None:
        """It has taken a post, or there was nothing to tell it."""
        self.refused = False
        if self.rest:
            self.rest -= 1
        elif anything:
            self.refusals = 0

    def did_not_take(self) -> None:
        """It has refused a post, or a part of it: it learns nothing anew for a while, each time twice as long."""
        self.refused = True
        self.rest = min(2 ** min(self.refusals, 6) - 1, _LONGEST_REST)
        self.refusals += 1

    def begin_anew(self, epoch: int) -> None:
        """Another draft side is there, or none: nothing is held against it."""
        self.epoch, self.refused, self.rest, self.refusals = epoch, False, 0, 0


class Slots:
    """Free slots and generations, shard by shard. A request keeps its slot, and with it its draft side."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.shards = [Shard(own, list(reversed(own)), channel.epoch(own.start)) for own in channel.shards]
        self._generations = {slot: 0 for shard in self.shards for slot in shard.slots}

    def __len__(self) -> int:
        """All slots, free or not."""
        return len(self._generations)

    @property
    def free(self) -> list[int]:
        """Slots that nobody has, of living and dead draft sides."""
        return [slot for shard in self.shards for slot in shard.free]

    @property
    def has_room(self) -> bool:
        """Whether a slot can be taken."""
        return any(shard.has_room for shard in self.shards)

    @property
    def has_room_anew(self) -> bool:
        """Whether a slot can be taken for a request that is told anew."""
        return any(shard.has_room and not shard.rest for shard in self.shards)

    @property
    def learns(self) -> bool:
        """Whether any draft side may be told of requests anew, if it has room."""
        return any(shard.epoch and not shard.rest for shard in self.shards)

    def look(self) -> list[Shard]:
        """The shards whose draft side is another one than at the last look.

        What is taken between two looks counts as taken under the epoch of the first: a life that begins in between
        knows nothing of it.
        """
        changed = []
        for shard in self.shards:
            now = self._channel.epoch(shard.slots.start)
            if now != shard.epoch:
                shard.begin_anew(now)
                changed.append(shard)
        return changed

    def take(self, anew: bool = False) -> Stamp | None:
        """Round 0 in a free slot of the living draft side that has the fewest requests; None where there is none.

        One that has refused what it was told last comes after all others, and one that rests has none for requests
        that are told `anew`.
        """
        able = [shard for shard in self.shards if shard.has_room and not (anew and shard.rest)]
        if not able:
            return None
        slot = min(able, key=lambda shard: (shard.refused, shard.load)).free.pop()
        self._generations[slot] += 1
        return Stamp(slot, self._generations[slot], 0)

    def give(self, slot: int) -> None:
        """A slot is free again."""
        for shard in self.shards:
            if slot in shard.slots:
                shard.free.append(slot)
