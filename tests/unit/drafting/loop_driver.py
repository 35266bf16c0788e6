"""A `DraftLoop` with its tables in memory, and requests of a simulated target that talk to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Admit, Outcome, Release, Stamp, Step, Table


@dataclass(slots=True)
class Request:
    """The target side of one request."""

    stamp: Stamp
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)

    def admit(self) -> Admit:
        return Admit(self.stamp, 0.0, tuple(self.tokens))

    def release(self) -> Release:
        return Release(self.stamp)

    def outcome(self, accepted: int, bonus: int, speculation: Sequence[int] = ()) -> Outcome:
        """The outcome of this round; the request goes on to the next one."""
        self.tokens += [*self.drafts[:accepted], bonus]
        self.drafts = list(speculation)
        outcome = Outcome(self.stamp, accepted, bonus, len(self.tokens), tuple(speculation))
        self.stamp = Stamp(self.stamp.slot, self.stamp.generation, self.stamp.round + 1)
        return outcome


class LoopDriver:
    """Runs the loop forward by forward and keeps the newest table of every slot."""

    def __init__(self, model: FakeModel, num_speculative_tokens: int = 3, branches: int = 4) -> None:
        self.model = model
        self.engine = make_engine(model, num_speculative_tokens, branches)
        self.loop = DraftLoop(self.engine, self._publish)
        self.tables: dict[int, Table] = {}
        self.history: list[tuple[Stamp, int]] = []
        """(stamp, depth) of every table published so far, in order."""

    def _publish(self, table: Table) -> None:
        rows = [[int(token) for token in row] for row in table.drafts]
        assert all(len(row) == len(table.bonus) == len(table.accepted) for row in rows)
        self.tables[table.stamp.slot] = Table(table.stamp, table.accepted, table.bonus, rows, table.seconds)
        self.history.append((table.stamp, len(rows)))

    def submit(
        self, admits: Sequence[Admit] = (), outcomes: Sequence[Outcome] = (), releases: Sequence[Release] = ()
    ) -> None:
        self.loop.submit(Step(list(admits), list(outcomes), list(releases)))

    def work(self, most: int = 1000) -> int:
        """Advance until there is nothing to do, at most `most` times; the number of forwards or turns."""
        for done in range(most):
            if not self.loop.advance():
                return done
        return most

    def table_of(self, request: Request) -> Table | None:
        """The table of the round that this request is in."""
        table = self.tables.get(request.stamp.slot)
        return table if table is not None and table.stamp == request.stamp else None

    def check_table(self, request: Request) -> Table:
        """There is a table for this round, and each branch of it is the oracle's continuation."""
        table = self.table_of(request)
        assert table is not None
        for i, (accepted, bonus) in enumerate(zip(table.accepted, table.bonus, strict=True)):
            text = [*request.tokens, *request.drafts[:accepted], bonus]
            assert list(table.speculation(i)) == self.model.greedy_continuation(text, len(table.drafts))
        return table

    def verify(self, request: Request, target: SimulatedTarget) -> tuple[Outcome, bool]:
        """The target's outcome for the drafts of this round, served from the table; and whether that was a hit."""
        *accepted, bonus = target.verify(request.tokens, request.drafts)
        table = self.table_of(request)
        branch = table.find(len(accepted), bonus) if table is not None else None
        drafts = table.speculation(branch) if table is not None and branch is not None else ()
        return request.outcome(len(accepted), bonus, drafts), bool(drafts)


def request(slot: int, length: int, generation: int = 1) -> Request:
    return Request(Stamp(slot, generation, 0), [(slot * 11 + 7 * i) % 40 for i in range(length)])
