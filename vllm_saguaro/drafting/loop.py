"""The draft side of the loop, one unit of work at a time.

`submit` takes in what the target side said, `advance` does the next forward. Whoever drives it decides what happens
between two forwards: the process placement looks into its mailbox, the inline placement just goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saguaro.drafting.diary import diary
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import Tree, Trunk
from vllm_saguaro.messages import Admit, Outcome, Release, Round, Stamp, Step, Table, Want, Work

MAX_ROWS_A_TREE = 256
"""Branches of all requests together; with more requests each gets fewer, so that a round stays a few forwards long."""

PROMPT_PIECE = 256
"""Tokens of a prompt in one forward while other requests wait for their tables."""


@dataclass(slots=True)
class Entry:
    """A request in a slot: its trunk, the stamp of the round it awaits, and when that round's work began."""

    stamp: Stamp
    trunk: Trunk
    known_at: float
    """When the newest outcome (or the prompt) arrived, in seconds of `time.perf_counter`."""
    forked: bool = False
    """Whether the table of this round has been begun."""
    again: bool = False
    """Whether it was, and was given up: then `known_at` tells nothing of the time that a round takes."""


class DraftLoop:
    """Keeps a table of predicted outcomes ready for every request: extend, fork, K times grow, publish as it goes."""

    def __init__(
        self, engine: DraftEngine, publish: Callable[[Table], None], note: Callable[[Round], None] | None = None
    ) -> None:
        """`publish(table)` is called when a table is forked (depth 0) and again at every depth; `note(round)`, for a
        trace, when all tables of a round are as they stay.
        """
        self.engine = engine
        self._publish = publish
        self._diary = diary(note)
        self._entries: dict[int, Entry] = {}
        """By slot, in the order in which they were told."""
        self._tree: Tree | None = None
        self._growing: list[Entry] = []
        self._awaited: tuple[float, float] | None = None
        """Of the outcomes that the tree is for: when those before came, and tokens a request in the pass between."""
        self._rest_began = 0.0
        self._rested = 0.0
        """Seconds for which the tree rested before it was gone on with. 0 in `_rest_began`: it does not rest now."""
        self._leaving: list[Trunk] = []
        self._prompts_next = False
        self._holding = False
        self._first_next = False
        self._few = engine.num_speculative_tokens + 1
        self.rows = MAX_ROWS_A_TREE
        """Branches of all requests together: less where other loops take turns with this one over the same model."""
        self.alone = True
        """Whether none does. Else the forward over a prompt is a piece, so that they do not wait for a whole one."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def demand(self) -> int:
        """Branches of all requests together, if each had as many as it may."""
        return min(len(self._entries) * self.engine.branches, MAX_ROWS_A_TREE)

    @property
    def growing(self) -> bool:
        """Whether there is a tree that has not all of its depths."""
        return self._tree is not None

    @property
    def rests(self) -> bool:
        """Whether what is there of the tables should stay: the next depth would come too late, and be in the way.

        For whoever drives the loop while the target computes: outcomes may come meanwhile, so ask again. The first
        depth never rests, so that a step is measured in every round; nor does a tree behind which a long text waits.
        """
        tree = self._tree
        if tree is None or not tree.depth or self._awaited is None:
            return False
        (known_at, tokens), now = self._awaited, time.perf_counter()
        rests = self.engine.pace.too_late(len(tree.next_ids), tokens, now - known_at) and not self._unread()
        if rests and not self._rest_began:
            self._rest_began = now
        return rests

    # ---- one step of the loop ----------------------------------------------------------------------------------

    def submit(self, step: Step) -> None:
        """Take in one step of the target: new requests, outcomes, departures."""
        for admit in step.admits:
            self._admit(admit)
        self._holding = False
        if step.wants:
            self._pursue(step.wants)
        if step.outcomes:
            self._stop_growing({outcome.stamp.slot for outcome in step.outcomes})
            self._settle_all(step.outcomes)
        for release in step.releases:
            self._release(release)

    def advance(self) -> bool:
        """Do the next forward, if there is anything to do: a step of the tree, a new round, or a piece of a prompt."""
        if self._tree is not None:
            self._grow(self._tree)
            return True
        if self._holding:
            # The outcomes of this step are known over there and come at once: no forward may stand in their way.
            return False
        self._let_go()
        # Texts to read and rounds take turns where both wait, so that neither starves the other.
        first, second = (self._prefill, self._begin_round) if self._prompts_next else (self._begin_round, self._prefill)
        return first() or second()

    def _stop_growing(self, settled: set[int]) -> None:
        """The tree under way was for outcomes that are now history: what it reached has been published.

        Requests in it that have no outcome in this step begin their round again, with the others.
        """
        for entry in self._growing:
            if entry.stamp.slot not in settled:
                self.engine.drop_branches(entry.trunk)
                entry.forked, entry.again = False, True
        self._finish()

    def _pursue(self, wants: Sequence[Want]) -> None:
        """Outcomes that the target waits at: their branches alone, before anything else."""
        wanted = []
        for want in wants:
            entry = self._entries.get(want.stamp.slot)
            # Only where the KV is complete: a target that waits for a prefill would wait for long.
            if (
                entry is not None
                and entry.stamp == want.stamp
                and entry.trunk.valid == entry.trunk.length
                and want.accepted <= len(entry.trunk.speculation)
                and self._can_hold((want.bonus,))
            ):
                wanted.append((entry, want))
        if not wanted:
            return
        self._holding = True
        entries = [entry for entry, _ in wanted]
        self._stop_growing({entry.stamp.slot for entry in entries})
        self._let_go()
        self._diary.begin(len(entries), Work.PURSUIT)
        depth = max(want.depth for _, want in wanted)
        tree = self.engine.pursue([(entry.trunk, want.accepted, want.bonus) for entry, want in wanted], depth)
        for entry in entries:
            entry.forked = True
        self._growing = [entry for entry in entries if entry.trunk.branches]
        self._publish_growing(anew=True)
        self._diary.forked(1)
        self._tree, self._awaited = tree, None
        if tree is None or tree.finished:
            self._finish()

    def _begin_round(self) -> bool:
        """Glue and fork for every request that awaits a table and lacks at most a few tokens."""
        self._prompts_next = True
        model, entries, tokens = self.engine.model, list[Entry](), 0
        for entry in self._entries.values():
            pending = entry.trunk.lacking
            if entry.forked or pending > self._few:
                continue
            if len(entries) == model.max_rows or tokens + pending > model.max_tokens:
                break  # the others come in the next round
            entries.append(entry)
            tokens += pending
        if not entries:
            return False
        self._diary.begin(len(entries))
        self.engine.extend([e.trunk for e in entries], self._few)
        self._diary.glued()
        ready = [e for e in entries if e.trunk.valid == e.trunk.length]
        for entry in entries:
            entry.forked = True  # also where no block was left: this round goes without, the next one tries again
        if ready:
            pace = self.engine.pace
            share = max(1, min(pace.branches(len(ready)), min(self.rows, model.max_rows) // len(ready)))
            self._tree = self.engine.fork([e.trunk for e in ready], share)
            self._growing = [e for e in ready if e.trunk.branches]
            self._publish_growing()
            self._diary.forked(share if self._growing else 0)
            decoding = [e for e in ready if e.stamp.round > 0]
            self._awaited = self._expectation(decoding) if decoding else None
            after_outcomes = [e.known_at for e in decoding if not e.again]
            if after_outcomes:  # the reading of a prompt is no glue
                pace.observe_glue(time.perf_counter() - max(after_outcomes))
        if self._tree is None:
            self._diary.end()
        return True

    @staticmethod
    def _expectation(decoding: Sequence[Entry]) -> tuple[float, float]:
        """When the newest outcome of these came, and 1 + the drafts that each has in the target's pass, on average."""
        drafts = sum(len(entry.trunk.speculation) for entry in decoding)
        return max(entry.known_at for entry in decoding), 1 + drafts / len(decoding)

    def _grow(self, tree: Tree) -> None:
        began = time.perf_counter()
        if self._rest_began:
            self._rested, self._rest_began = self._rested + began - self._rest_began, 0.0
        self.engine.grow(tree)
        self._publish_growing()
        self.engine.pace.observe_step(len(tree.next_ids), time.perf_counter() - began)
        self._diary.grown()
        if tree.finished:
            self._finish()

    def _finish(self) -> None:
        """What the tree under way has reached is what there is."""
        self._tree, self._growing = None, []
        self._rest_began = self._rested = 0.0
        self._diary.end()

    def _prefill(self) -> bool:
        """A piece of a text that is not read yet: in turns of the one that was told first and of the shortest rest.

        After a restart the running requests are here all at once, with those that arrive. The shortest rest gives the
        most tables for the time; the first one's turns see to it that none waits for ever.
        """
        self._prompts_next = False
        waiting = self._unread()
        if not waiting:
            return False
        self._first_next = not self._first_next
        entry = waiting[0] if self._first_next else min(waiting, key=lambda e: e.trunk.lacking)
        model, trunk, alone = self.engine.model, entry.trunk, self.alone and len(self._entries) == 1
        before, began = trunk.valid, self._diary.now()
        if self.engine.has_room_for(trunk):
            self.engine.extend([trunk], model.max_tokens if alone else min(PROMPT_PIECE, model.max_tokens))
        if trunk.valid == before:
            self.engine.release(trunk)  # half a prompt is of no use, and others may need the blocks
            entry.forked = True  # tried again at its next outcome
        else:
            self._diary.read(began, trunk.valid - before)
        return True

    def _unread(self) -> list[Entry]:
        """Requests whose text is not read yet, but for the few tokens of a round."""
        return [e for e in self._entries.values() if not e.forked and e.trunk.lacking > self._few]

    # ---- what the target side says -----------------------------------------------------------------------------

    def _admit(self, admit: Admit) -> None:
        old = self._entries.pop(admit.stamp.slot, None)
        if old is not None:
            self._leave(old)
        if not self._can_hold(admit.token_ids):
            self._publish(Table(admit.stamp.gone(), [], [], []))
            return
        trunk = self.engine.admit(list(admit.token_ids), admit.sampling)
        self._entries[admit.stamp.slot] = Entry(admit.stamp, trunk, time.perf_counter())

    def _can_hold(self, token_ids: Sequence[int]) -> bool:
        """Whether the draft has room for this text and knows its tokens: a target may have more of them."""
        model = self.engine.model
        return 0 < len(token_ids) <= model.max_length and max(token_ids) < model.vocab_size

    def _settle_all(self, outcomes: Sequence[Outcome]) -> None:
        rounds = [seconds for outcome in outcomes if (seconds := self._settle(outcome)) is not None]
        if rounds:
            # The least: a request that sat out some steps has had more than one of them.
            self.engine.pace.observe_round(1 + sum(o.verified for o in outcomes) / len(outcomes), min(rounds))

    def _settle(self, outcome: Outcome) -> float | None:
        """Seconds since the outcome before this one, if there was one."""
        entry = self._entries.get(outcome.stamp.slot)
        if entry is None or entry.stamp != outcome.stamp:
            self._say_if_lost(entry, outcome.stamp)
            return None
        trunk = entry.trunk
        agrees = outcome.accepted <= len(trunk.speculation)
        fits = outcome.length + len(outcome.speculation) <= self.engine.model.max_length
        if (
            not fits
            or not self._can_hold((outcome.bonus, *outcome.speculation))
            or not agrees
            or len(trunk.tokens) + outcome.accepted + 1 != outcome.length
        ):
            # Too long, or the two sides no longer talk of the same text: better no table than a useless one.
            self._leave(self._entries.pop(outcome.stamp.slot))
            self._publish(Table(entry.stamp.gone(), [], [], []))
            return None
        self.engine.settle(trunk, outcome.accepted, outcome.bonus, list(outcome.speculation), outcome.verified)
        now = time.perf_counter()
        seconds = now - entry.known_at if entry.stamp.round > 0 else None
        entry.stamp, entry.known_at, entry.forked, entry.again = entry.stamp.next(), now, False, False
        return seconds

    def _say_if_lost(self, entry: Entry | None, stamp: Stamp) -> None:
        """An outcome of a request that was never told, or whose outcome before this one was not: it must be told anew.

        What was told twice is behind what is known, and needs no answer.
        """
        if entry is not None and (stamp.generation, stamp.round) < (entry.stamp.generation, entry.stamp.round):
            return
        if entry is not None:
            self._leave(self._entries.pop(stamp.slot))
        self._publish(Table(stamp.gone(), [], [], []))

    def _release(self, release: Release) -> None:
        entry = self._entries.get(release.stamp.slot)
        if entry is not None and entry.stamp.generation == release.stamp.generation:
            self._leave(self._entries.pop(release.stamp.slot))

    def _leave(self, entry: Entry) -> None:
        # A growing tree still writes into this request's blocks: they are free once it stands still.
        self._leaving.append(entry.trunk)
        self._growing = [other for other in self._growing if other is not entry]
        if not self._growing:
            self._finish()

    def _let_go(self) -> None:
        for trunk in self._leaving:
            self.engine.release(trunk)
        self._leaving.clear()

    def _publish_growing(self, anew: bool = False) -> None:
        """The tables of all requests in the tree, one depth more than before; `anew`: other branches than before."""
        now, c = time.perf_counter(), self.engine.deflations.chosen
        for entry in self._growing:
            trunk = entry.trunk
            accepted = [branch.accepted for branch in trunk.branches]
            bonus = [branch.bonus for branch in trunk.branches]
            drafts = self.engine.drafts_of(trunk)
            for depth in range(len(drafts) + 1) if anew else [len(drafts)]:
                q = self.engine.q_of(trunk, depth - 1) if depth else None
                seconds = now - entry.known_at - self._rested
                self._publish(Table(entry.stamp, accepted, bonus, drafts[:depth], seconds, q, sampling_c=c))
