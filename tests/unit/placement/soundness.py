"""What anything that comes out of a mailbox must be, whatever lay in it. Said here without the code that sees to it."""

from __future__ import annotations

import math

from vllm_saguaro.messages import Noise, Proposals, Sampling, Stamp, Step, Table
from vllm_saguaro.placement.layout import MailboxShape
from vllm_saguaro.placement.wire import Limits, encode

INT32 = 2**31


def assert_sound_table(table: Table, slot: int, shape: MailboxShape) -> None:
    """A table that nothing can go wrong with: not in the lookup, and not in the target's embedding."""
    assert table.stamp.slot == slot
    assert table.stamp.generation >= 0
    assert table.stamp.round >= -1
    assert len(table.accepted) == len(table.bonus) <= shape.branches
    assert len(table.drafts) <= shape.num_speculative_tokens
    assert all(0 <= k <= shape.num_speculative_tokens for k in table.accepted)
    assert all(0 <= token < shape.vocab_size for token in table.bonus)
    for row in table.drafts:
        assert len(row) == len(table.bonus)
        assert all(0 <= token < shape.vocab_size for token in row)
    assert 0 <= table.seconds <= 3600
    for branch, key in enumerate(zip(table.accepted, table.bonus, strict=True)):
        found = table.find(*key)
        assert found is not None
        assert found <= branch
        assert len(table.speculation(branch)) == len(table.drafts)


def assert_sound_depth(table: Table, shape: MailboxShape) -> None:
    """One depth of a table, as it comes over the network: what the mailbox may rely on."""
    count, vocabulary = len(table.bonus), shape.vocab_size
    assert 0 <= table.stamp.slot < shape.slots
    assert 0 <= table.stamp.generation < INT32
    assert -1 <= table.stamp.round < 2**63
    assert 0 <= table.seconds < 1e6
    assert table.sampling_c is None or 0 <= table.sampling_c <= 1
    assert count == len(table.accepted) <= shape.branches
    assert len(table.drafts) <= shape.num_speculative_tokens
    if table.drafts:
        assert len(table.drafts[-1]) == count
        assert all(0 <= token < vocabulary for token in table.drafts[-1])
    else:
        assert all(0 <= token < vocabulary for token in table.bonus)
        assert all(0 <= k <= shape.num_speculative_tokens for k in table.accepted)
    if table.newest is not None:
        assert table.drafts, "only drafts have a q"
        assert table.newest.tokens.shape == table.newest.probabilities.shape
        assert table.newest.tokens.shape[0] == count
        assert table.newest.tokens.shape[1] <= shape.support
        assert ((table.newest.tokens >= 0) & (table.newest.tokens < vocabulary)).all()
        assert ((table.newest.probabilities >= 0) & (table.newest.probabilities <= 1.001)).all()


def assert_sound_q(q: Proposals, depth: int, shape: MailboxShape) -> None:
    """Distributions over tokens of the target."""
    assert q.tokens.shape == q.probabilities.shape == (depth, shape.support)
    for tokens, probabilities in zip(q.tokens.tolist(), q.probabilities.tolist(), strict=True):
        assert all(0 <= p <= 1.001 for p in probabilities)
        assert math.fsum(probabilities) - 1 < 1e-3
        assert 1 - math.fsum(probabilities) < 1e-3
        drawable = [token for token, p in zip(tokens, probabilities, strict=True) if p > 0]
        assert len(set(drawable)) == len(drawable)
        assert all(0 <= token < shape.vocab_size for token in drawable)


def assert_sound_step(step: Step, limits: Limits) -> None:
    """A step within the limits, with nothing negative in it."""
    most = limits.num_speculative_tokens
    for admit in step.admits:
        _assert_sound_stamp(admit.stamp, limits)
        _assert_sound_sampling(admit.sampling)
        assert all(0 <= token < INT32 for token in admit.token_ids)
    for want in step.wants:
        _assert_sound_stamp(want.stamp, limits)
        assert 0 <= want.accepted <= most
        assert 0 <= want.depth <= most
        assert 0 <= want.bonus < INT32
    for outcome in step.outcomes:
        _assert_sound_stamp(outcome.stamp, limits)
        assert 0 <= outcome.accepted <= outcome.verified <= most
        assert 0 <= outcome.bonus < INT32
        assert 0 <= outcome.length < INT32
        assert len(outcome.speculation) <= most
        assert all(0 <= token < INT32 for token in outcome.speculation)
    for release in step.releases:
        _assert_sound_stamp(release.stamp, limits)


def assert_canonical(step: Step, data: bytes) -> None:
    """There is one way to say a step."""
    assert encode(step) == data


def _assert_sound_stamp(stamp: Stamp, limits: Limits) -> None:
    assert 0 <= stamp.slot < limits.slots
    assert 0 <= stamp.generation < INT32
    assert 0 <= stamp.round < 2**63


def _assert_sound_sampling(sampling: Sampling) -> None:
    assert 0 <= sampling.temperature < math.inf
    assert 0 <= sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 <= sampling.top_k < INT32
    assert 0 <= sampling.prompt_length < INT32
    assert sampling.noise in Noise
