"""Target side and draft side without threads: whoever drives them says when the draft side works."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.unit.state_machine.draft_side import DraftSide, Round, Sizes
from tests.unit.state_machine.surface import DrivenPolicy, entries_of, free_slots, stamps_of, unheard
from tests.unit.state_machine.target import Oracle, Request
from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Miss, Proposals, Stamp, Step, Table
from vllm_saguaro.speculator import Speculator


@dataclass
class DrivenChannel:
    """A channel over the mailbox of a draft side that works between two calls only when it is told to."""

    draft: DraftSide
    max_length: int
    note: Callable[[Step], None]
    """Called with every step before it is posted."""
    stamps: Callable[[], dict[str, Stamp]]
    """The rounds that the target side awaits, for an error that is planted."""
    shards: Sequence[range]
    alive: bool = True
    life: int = 1
    stalled_seconds: float = 0.0
    resident_bytes: int = 0
    sampling_c: float | None = None
    refused: int = 0
    """Steps that found no room."""
    meanwhile: list[str] = field(default_factory=list)
    """What the draft side does before each of the next calls: any of r (receive), a (advance), ! (end)."""
    otherwise: str = ""
    """The same for the calls after these."""

    def epoch(self, slot: int) -> int:
        return self.life if self.alive else 0

    def post(self, step: Step) -> bool:
        self._pass_time()
        self.note(step)
        taken = self.alive and self.draft.mailbox.post(step)
        self.refused += self.alive and not taken
        return taken

    def read(self, slot: int) -> Table | None:
        self._pass_time()
        return self.draft.mailbox.read(slot) if self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        return self.draft.mailbox.proposals(stamp, version, branch, depth)

    def wait_until_ready(self) -> None:
        pass

    def close(self) -> None:
        self.alive = False

    def _pass_time(self) -> None:
        for action in self.meanwhile.pop(0) if self.meanwhile else self.otherwise:
            if not self.alive:
                return
            if action == "r":
                self.draft.receive()
            elif action == "a":
                self.draft.loop.advance()
            else:
                self.alive = False


class TwoSides:
    """A speculator and its draft side, and what both must agree on."""

    def __init__(self, sizes: Sizes, oracle: Oracle, text_of: Callable[[str], Request]) -> None:
        self.sizes = sizes
        self.rounds: dict[Stamp, Round] = {}
        self.lost: set[Stamp] = set()
        """Requests that the target side takes for known although a draft side began anew; as of round 0."""
        self.page = CounterPage()
        self._oracle = oracle
        self._request_of = text_of
        self.channel = DrivenChannel(
            self._new_draft(),
            sizes.max_length,
            self._note,
            lambda: stamps_of(self.speculator),
            shards=(range(sizes.slots),),
        )
        log = logging.Logger("saguaro-test", logging.CRITICAL)  # what is logged is tested elsewhere
        steps = sizes.num_speculative_tokens
        self.policy = DrivenPolicy(steps, sizes.backup)
        self.speculator = Speculator(self.channel, steps, self.page, log, self.policy)

    @property
    def draft(self) -> DraftSide:
        return self.channel.draft

    def restart_draft(self) -> None:
        """Another draft side in the place of this one, with a mailbox that nobody has written to."""
        self.lost |= {_first(stamp) for stamp in stamps_of(self.speculator).values()}
        self.channel.draft = self._new_draft()
        self.channel.life += 1

    def _has_strange_tokens(self, first: Stamp) -> bool:
        """Whether the draft side has been told of a token of this request that it does not know."""
        told = (known.text + known.speculation for stamp, known in self.rounds.items() if _first(stamp) == first)
        return any(max(tokens) >= self.sizes.vocab_size for tokens in told)

    def _new_draft(self) -> DraftSide:
        return DraftSide(self.sizes, self.rounds, self._oracle)

    def _note(self, step: Step) -> None:
        """Before the draft side can hear of a round: what it is about."""
        speculation = {outcome.stamp.next(): list(outcome.speculation) for outcome in step.outcomes}
        for name, stamp in stamps_of(self.speculator).items():
            if stamp not in self.rounds:
                request = self._request_of(name)
                self.rounds[stamp] = Round(request, list(request.text), speculation.get(stamp, []))

    def counts(self) -> Counter[str]:
        """What the speculator has counted."""
        found = {f"miss: {cause}": self.page.value(counter) for cause, counter in counters.MISSES.items()}
        found |= {"hit": self.page.value(counters.HITS), "late table": self.page.value(counters.LATE_TABLES)}
        found |= {f"backup: {kind}": self.page.value(counter) for kind, counter in counters.BACKUPS.items()}
        found |= {"late branch went on": sum(gained > 0 for gained in self.policy.late_rows)}
        found |= {"step refused": self.channel.refused, "quiet step": self.page.value(counters.QUIET_STEPS)}
        return Counter({name: int(value) for name, value in found.items() if value})

    # ---- what must hold ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any time."""
        taken = [stamp.slot for stamp in stamps_of(self.speculator).values()]
        assert sorted(taken + free_slots(self.speculator)) == list(range(self.sizes.slots)), "a slot is lost or doubled"
        if self.channel.alive:
            self.draft.check()

    def check_at_rest(self) -> Counter[str]:
        """When the draft side has done all there is to do: it serves whom it can. What was seen, by name."""
        seen: Counter[str] = Counter()
        known = {_first(stamp): (name, stamp) for name, stamp in stamps_of(self.speculator).items()}
        had = {_first(stamp): stamp for stamp in entries_of(self.draft.loop)}
        if not unheard(self.speculator):
            assert not had.keys() - known.keys(), "the draft side keeps a request that is not there any more"
        for first, (name, stamp) in known.items():
            if first in self.lost:
                continue
            request, table = self._request_of(name), self.draft.mailbox.read(stamp.slot)
            if self._has_strange_tokens(first):
                assert first not in had
                assert table is not None
                assert table.stamp == stamp.gone(), "nothing says that the draft side does not have this request"
                seen["gone"] += 1
                continue
            assert had[first] == stamp, "the two sides are not in the same round"
            steps = self.sizes.num_speculative_tokens
            current = table is not None and table.stamp == stamp
            if table is not None and current and len(table.bonus) == 1 and self.sizes.backup in ("jit", "auto"):
                seen["table for one outcome"] += 1  # just in time, and perhaps not as deep as others
            elif self.sizes.plenty and len(request.text) + 2 * steps <= self.sizes.max_length:
                assert table is not None
                assert (table.stamp, len(table.drafts)) == (stamp, steps), "no finished table for this round"
                seen["finished table"] += 1
            elif not current:
                seen["no room for a table"] += 1
        return seen


def _first(stamp: Stamp) -> Stamp:
    """Names a request whatever its round."""
    return Stamp(stamp.slot, stamp.generation, 0)


MISSES = [f"miss: {cause}" for cause in Miss]
