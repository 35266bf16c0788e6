"""A real draft side behind a link that loses, repeats, holds back, mixes up and alters what crosses it.

In one process and without threads: the draft side works when it is told to, and time is a number. One `FaultyChannel`
is one life; `RestartingChannel` goes around it as around any other.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Proposals, Stamp, Step, Table
from vllm_saguaro.placement.channel import DraftFailed
from vllm_saguaro.placement.mailbox import Mailbox, MailboxShape
from vllm_saguaro.placement.wire import WireError, decode, encode

STEP_FAULTS = ("lost", "twice", "late", "refused", "altered")
TABLE_FAULTS = ("hidden", "stale", "altered")
_RING_FRAMES = 12
"""Frames that find room in the ring unread."""
MOST_LOOKS = 500
"""Looks at a table within one step of the target. More of them means that somebody waits for what does not come."""


@dataclass
class Link:
    """What happens to the next steps and tables that cross, one after the other; to those after these nothing does."""

    steps: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    now: float = 0.0
    looks: int = 0
    """Since it was last set to 0."""
    seen: set[str] = field(default_factory=set)
    """Every fault that did happen."""
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def next_of(self, faults: list[str]) -> str:
        fault = faults.pop(0) if faults else ""
        if fault:
            self.seen.add(f"{'step' if faults is self.steps else 'table'} {fault}")
        return fault


class FaultyChannel:
    """One life of a draft side."""

    resident_bytes = 0
    sampling_c: float | None = None

    def __init__(self, link: Link, model: FakeModel, shape: MailboxShape, fails: bool = False) -> None:
        self.link, self.max_length, self._fails = link, model.max_length, fails
        self.shards: Sequence[range] = (range(shape.slots),)
        self.alive = True
        self.frozen = False
        self.engine = DraftEngine(model, shape.num_speculative_tokens, shape.branches, seed=1)
        self._mailbox = Mailbox(memoryview(bytearray(shape.total_bytes)), shape)
        self.loop = DraftLoop(self.engine, self._mailbox.publish)
        self._inbox: list[tuple[float, bytes]] = []
        self._held: list[tuple[float, bytes]] = []
        self._before: dict[int, Table] = {}

    # ---- what the target side calls ----------------------------------------------------------------------------

    @property
    def stalled_seconds(self) -> float:
        return self.link.now - self._inbox[0][0] if self.alive and self._inbox else 0.0

    def epoch(self, slot: int) -> int:
        return int(self.alive)

    def post(self, step: Step) -> bool:
        fault = self.link.next_of(self.link.steps) if self.alive else ""
        if not self.alive or fault == "refused":
            return False
        if len(self._inbox) >= _RING_FRAMES:
            self.link.seen.add("ring full")
            return False
        frame = self.link.now, self._altered(encode(step)) if fault == "altered" else encode(step)
        if fault == "late":
            self._held.append(frame)
            return True
        self._inbox += [] if fault == "lost" else [frame, frame] if fault == "twice" else [frame]
        if self._held and self.link.dice.random() < 0.4:
            self._inbox.append(self._held.pop(self.link.dice.randrange(len(self._held))))
        return True

    def read(self, slot: int) -> Table | None:
        self.link.looks += 1
        assert self.link.looks < MOST_LOOKS, "somebody waits for what does not come"
        fault = self.link.next_of(self.link.tables) if self.alive else ""
        if not self.alive or fault == "hidden":
            return None
        if fault == "stale":
            return self._before.get(slot)
        table = self._mailbox.read(slot)
        if table is None:
            return None
        self._before[slot] = table
        return self._other(table) if fault == "altered" else table

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        return self._mailbox.proposals(stamp, version, branch, depth) if self.alive else None

    def wait_until_ready(self) -> None:
        if self._fails:
            raise DraftFailed("it is made to fail")

    def close(self) -> None:
        self.alive = False

    # ---- what happens to the draft side ------------------------------------------------------------------------

    def work(self, forwards: int) -> None:
        """Take in all that has come, and do so many forwards, unless it is frozen or dead."""
        if self.frozen or not self.alive:
            return
        for _ in range(forwards):
            try:
                while self._inbox:
                    self._submit(self._inbox.pop(0)[1])
                if not self.loop.advance():
                    return
            except Exception:
                if "step altered" not in self.link.seen:
                    raise
                self.alive = False  # as a process that is told nonsense may end
                return

    def _submit(self, data: bytes) -> None:
        try:
            step = decode(data)
        except WireError:
            self.link.seen.add("frame refused")
        else:
            self.loop.submit(step)

    def let_come(self) -> None:
        """What was held back arrives."""
        self._inbox += self._held
        self._held = []

    def _altered(self, data: bytes) -> bytes:
        """A byte of the second half is another one, mostly in a number; or the end is missing."""
        if self.link.dice.random() < 0.3:
            return data[:-3]
        at = self.link.dice.randrange(len(data) // 2, len(data))
        return data[:at] + bytes([data[at] ^ 1 << self.link.dice.randrange(3)]) + data[at + 1 :]

    def _other(self, table: Table) -> Table:
        """Another bonus token, other drafts, or another round."""
        kind = self.link.dice.randrange(3)
        if kind == 0 and table.bonus:
            return dataclasses.replace(table, bonus=[(token + 1) % 8 for token in table.bonus])
        if kind == 1:
            return dataclasses.replace(table, drafts=[[(int(t) + 3) % 8 for t in row] for row in table.drafts])
        return dataclasses.replace(table, stamp=dataclasses.replace(table.stamp, round=table.stamp.round + 1))
