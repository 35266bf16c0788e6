"""Errors that are planted into an engine with runner V2: each must turn something red.

Of the drafts of a script, of a real draft on a stream (`stream: ..`), and of a real draft process (`process: ..`). A q
that is told *sharper* than the tokens were drawn from, as if at an eighth of the temperature, is what a T in the wrong
place would give. *Stale* are the tokens of the table before, beside the q of this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from tests.v2.v2_engine import V2Engine

SHARPER = 8
"""The power of q that is told."""


@contextlib.contextmanager
def unmarked(engine: V2Engine) -> Iterator[None]:
    """Filler is verified like any draft."""
    with mock.patch.object(engine.runner, "rejection_sampler", engine.runner.rejection_sampler._sampler):
        yield


@contextlib.contextmanager
def marked_one_late(engine: V2Engine) -> Iterator[None]:
    """The mask is off by one row: the first filler of each request counts as real."""
    marked = engine.runner.rejection_sampler

    class Late(type(marked)):  # type: ignore[misc]
        def __call__(self, logits: Any, batch: Any, *others: Any) -> Any:
            self._ready = marked._ready + 1
            return super().__call__(logits, batch, *others)

    with mock.patch.object(engine.runner, "rejection_sampler", Late(marked._sampler, marked._ready)):
        yield


@contextlib.contextmanager
def reads_on_the_host(engine: V2Engine) -> Iterator[None]:
    """A draft that looks at an outcome: what the guard is there for."""
    draft = engine.draft
    assert draft is not None
    exchange = draft.exchange

    def reading(outcomes: Any) -> Any:
        outcomes.accepted.tolist()
        return exchange(outcomes)

    with mock.patch.object(draft, "exchange", reading):
        yield


@contextlib.contextmanager
def first_draft_believed(engine: V2Engine) -> Iterator[None]:
    """Of coupled drafts the first counts as what the target says."""
    from vllm_saguaro.algorithm.agreement import agreed
    from vllm_saguaro.vllm_hooks import coupled_sampler

    def believing(drawn: Any, drafts: Any, begins: Any, places: Any, count: int) -> Any:
        drawn = drawn.clone()
        first = ((places == 1) & (drafts >= 0)).nonzero().squeeze(1)
        drawn[first - 1] = drafts[first].to(drawn.dtype)
        return agreed(drawn, drafts, begins, places, count)

    with mock.patch.object(coupled_sampler, "agreed", believing):
        yield


@contextlib.contextmanager
def stream_stale(engine: V2Engine) -> Iterator[None]:
    """The drafts of the last hit in the slot, in the place of those of this one, on a stream."""
    import torch

    device_round, k = engine.draft.engine.round, engine.draft.engine.num_speculative_tokens
    look_up, former = device_round.look_up, torch.full((device_round.state.nobody + 1, k), -1)

    def keeping(bucket: Any) -> None:
        look_up(bucket)
        step = device_round.step
        slots, now = step.slots[: bucket.batch], step.tokens[: bucket.batch].clone()
        hit = (step.branch[: bucket.batch] >= 0).unsqueeze(1)
        step.tokens[: bucket.batch] = torch.where(hit & (former[slots] >= 0), former[slots], now)
        step.speculation[: bucket.batch] = step.tokens[: bucket.batch]
        former[slots] = torch.where(hit, now, former[slots])

    with mock.patch.object(device_round, "look_up", keeping):
        yield


@contextlib.contextmanager
def stream_told_sharper(engine: V2Engine) -> Iterator[None]:
    """A wrong q of a draft on a stream: still a distribution, and one that could have given the draft."""
    draft = engine.draft
    assert draft is not None
    logits_into = draft.logits_into

    def lying(outcomes: Any, drafts: Any, draft_logits: Any) -> None:
        logits_into(outcomes, drafts, draft_logits)
        if draft_logits is not None:
            draft_logits[outcomes.slots.long()] *= SHARPER  # T log q, so this is q to that power; -inf stays

    with mock.patch.object(draft, "logits_into", lying):
        yield


@contextlib.contextmanager
def process_told_sharper(engine: V2Engine) -> Iterator[None]:
    """A wrong q of a draft process: still a distribution, and one that could have given the draft."""
    from vllm_saguaro.placement.device_tables import TableReader

    proposals = TableReader.proposals

    def lying(self: TableReader, slots: Any, stamps: Any, branch: Any) -> Any:
        tokens, probabilities, there = proposals(self, slots, stamps, branch)
        power = probabilities**SHARPER
        return tokens, power / power.sum(-1, keepdim=True).clamp_min(1e-30), there

    with mock.patch.object(TableReader, "proposals", lying):
        yield


PLANTS = {
    "unmarked": unmarked,
    "marked one late": marked_one_late,
    "reads on the host": reads_on_the_host,
    "first draft believed": first_draft_believed,
    "stream: stale": stream_stale,
    "stream: told sharper": stream_told_sharper,
    "process: told sharper": process_told_sharper,
}
