"""Which request has which slot, shared out among the draft sides behind one channel."""

from __future__ import annotations

from vllm_saguaro.messages import Stamp
from vllm_saguaro.placement.channel import Channel


class Slots:
    """Free slots and generations, shard by shard. A request keeps its slot, and with it its draft side."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._shards = list(channel.shards)
        self._free = [list(reversed(shard)) for shard in self._shards]
        self._generations = {slot: 0 for shard in self._shards for slot in shard}
        self._epochs = [channel.epoch(shard.start) for shard in self._shards]

    def __len__(self) -> int:
        """All slots, free or not."""
        return len(self._generations)

    @property
    def free(self) -> list[int]:
        """Slots that nobody has, of living and dead draft sides."""
        return [slot for free in self._free for slot in free]

    @property
    def has_room(self) -> bool:
        """Whether a slot can be taken."""
        return any(epoch and free for epoch, free in zip(self._epochs, self._free, strict=True))

    def look(self) -> list[tuple[range, int]]:
        """The shards whose draft side is another one than at the last look: (slots, epoch now).

        What is taken between two looks counts as taken under the epoch of the first: a life that begins in between
        knows nothing of it.
        """
        now = [self._channel.epoch(shard.start) for shard in self._shards]
        if now == self._epochs:
            return []
        before, self._epochs = self._epochs, now
        return [(s, new) for s, old, new in zip(self._shards, before, now, strict=True) if old != new]

    def take(self) -> Stamp | None:
        """Round 0 in a free slot of the living draft side that has the fewest requests; None where there is none."""
        shards = zip(self._shards, self._free, self._epochs, strict=True)
        living = [(len(shard) - len(free), free) for shard, free, epoch in shards if epoch and free]
        if not living:
            return None
        slot = min(living, key=lambda one: one[0])[1].pop()
        self._generations[slot] += 1
        return Stamp(slot, self._generations[slot], 0)

    def give(self, slot: int) -> None:
        """A slot is free again."""
        for shard, free in zip(self._shards, self._free, strict=True):
            if slot in shard:
                free.append(slot)
