"""A `DraftLoop` with its tables in memory, and requests of a simulated target that talk to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tests.unit.drafting.checks import GREEDY, continuation, dense, drawn_from, make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Admit, Outcome, Proposals, Release, Sampling, Stamp, Step, Table, Want


@dataclass(slots=True)
class Request:
    """The target side of one request."""

    stamp: Stamp
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)
    sampling: Sampling = GREEDY

    def admit(self) -> Admit:
        return Admit(self.stamp, self.sampling, tuple(self.tokens))

    def want(self, accepted: int, bonus: int, depth: int) -> Want:
        """The outcome of this round, which had no drafts. The round goes on."""
        return Want(self.stamp, accepted, bonus, depth)

    def release(self) -> Release:
        return Release(self.stamp)

    def outcome(self, accepted: int, bonus: int, speculation: Sequence[int] = ()) -> Outcome:
        """The outcome of this round; the request goes on to the next one."""
        verified = len(self.drafts)
        self.tokens += [*self.drafts[:accepted], bonus]
        self.drafts = list(speculation)
        outcome = Outcome(self.stamp, accepted, bonus, len(self.tokens), tuple(speculation), verified)
        self.stamp = Stamp(self.stamp.slot, self.stamp.generation, self.stamp.round + 1)
        return outcome


class LoopDriver:
    """Runs the loop forward by forward and keeps the newest table of every slot."""

    def __init__(
        self,
        model: FakeModel,
        num_speculative_tokens: int = 3,
        branches: int = 4,
        engine: DraftEngine | None = None,
    ) -> None:
        self.model = model
        self.engine = engine or make_engine(model, num_speculative_tokens, branches)
        self.loop = DraftLoop(self.engine, self._publish)
        self.tables: dict[int, Table] = {}
        self.proposals: dict[int, list[Proposals | None]] = {}
        """q of every depth of the newest table of a slot."""
        self.history: list[tuple[Stamp, int]] = []
        """(stamp, depth) of every table published so far, in order."""

    def _publish(self, table: Table) -> None:
        rows = [[int(token) for token in row] for row in table.drafts]
        assert all(len(row) == len(table.bonus) == len(table.accepted) for row in rows)
        slot = table.stamp.slot
        if rows:
            before = self.tables[slot]
            assert (before.stamp, before.accepted, before.bonus) == (table.stamp, table.accepted, table.bonus)
            assert before.drafts == rows[:-1], "a table goes from depth to depth"
        self.tables[slot] = Table(table.stamp, table.accepted, table.bonus, rows, table.seconds)
        self.proposals[slot] = [*self.proposals[slot], table.newest] if rows else []
        self.history.append((table.stamp, len(rows)))

    def submit(
        self,
        admits: Sequence[Admit] = (),
        outcomes: Sequence[Outcome] = (),
        releases: Sequence[Release] = (),
        wants: Sequence[Want] = (),
    ) -> None:
        self.loop.submit(Step(admits=list(admits), wants=list(wants), outcomes=list(outcomes), releases=list(releases)))

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
        """There is a table for this round, and each branch of it is the oracle's continuation.

        Where drafts are sampled: the q that came with each depth is the oracle's, and can give the token.
        """
        table = self.table_of(request)
        assert table is not None
        sampled = not (request.sampling.greedy or request.sampling.coupled)
        proposals = self.proposals[request.stamp.slot]
        assert [q is not None for q in proposals] == [sampled] * len(table.drafts)
        for i, (accepted, bonus) in enumerate(zip(table.accepted, table.bonus, strict=True)):
            text = [*request.tokens, *request.drafts[:accepted], bonus]
            drafts = list(table.speculation(i))
            if not sampled:
                assert drafts == continuation(self.model, request.sampling, text, len(table.drafts))
            for draft, q in zip(drafts, proposals, strict=True):
                if q is not None:
                    published = dense(q, self.model.vocab_size)[i]
                    expected = drawn_from(self.model, request.sampling, text)
                    torch.testing.assert_close(published, expected, atol=1e-5, rtol=1e-3)
                    assert published[draft] > 0
                text.append(draft)
        return table

    def verify(self, request: Request, target: SimulatedTarget) -> tuple[Outcome, bool]:
        """The target's outcome for the drafts of this round, served from the table; and whether that was a hit."""
        *accepted, bonus = target.verify(request.tokens, request.drafts)
        table = self.table_of(request)
        branch = table.find(len(accepted), bonus) if table is not None else None
        drafts = table.speculation(branch) if table is not None and branch is not None else ()
        return request.outcome(len(accepted), bonus, drafts), bool(drafts)


def request(slot: int, length: int, generation: int = 1, sampling: Sampling = GREEDY) -> Request:
    tokens = [(slot * 11 + 7 * i) % 40 for i in range(length)]
    return Request(Stamp(slot, generation, 0), tokens, sampling=replace(sampling, prompt_length=length))
