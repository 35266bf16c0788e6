"""What must hold of an engine at any time, checked against the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.algorithm import outcomes
from vllm_saguaro.drafting.engine import DraftEngine, Trunk


def make_engine(
    model: FakeModel, num_speculative_tokens: int = 3, branches: int = 4, fan_out: str = "ranked"
) -> DraftEngine:
    return DraftEngine(model, num_speculative_tokens, branches, fan_out)


def fake_of(engine: DraftEngine) -> FakeModel:
    assert isinstance(engine.model, FakeModel)
    return engine.model


def prefill(engine: DraftEngine, trunks: Sequence[Trunk], most: int = 64) -> None:
    """Bring the KV of all trunks up to date; each must come forward in every forward."""
    while waiting := [trunk for trunk in trunks if trunk.pending()]:
        before = [trunk.valid for trunk in waiting]
        engine.extend(waiting, most)
        assert all(trunk.valid > valid for trunk, valid in zip(waiting, before, strict=True))


def check_blocks(engine: DraftEngine, trunks: Sequence[Trunk]) -> None:
    """No block is lost and none has two owners. Whatever is free is wiped, so that nobody can go on reading it."""
    held = [block for trunk in trunks for block in trunk.blocks]
    held += [block for trunk in trunks for branch in trunk.branches for block in branch.blocks]
    assert len(set(held)) == len(held), "a block has two owners"
    assert engine.pool.num_free + len(held) == engine.pool.num_blocks, "a block was lost"
    fake_of(engine).wipe(set(range(engine.pool.num_blocks)) - set(held))


def check_predictions(engine: DraftEngine, trunk: Trunk) -> None:
    """The branches are the likeliest outcomes by the logits that the oracle has after each prefix."""
    n = len(trunk.speculation)
    prefixes = [trunk.tokens + trunk.speculation[:k] for k in range(n + 1)]
    expected = outcomes.choose(
        engine.fan_out,
        torch.stack([fake_of(engine).logits_after(prefix) for prefix in prefixes]).unsqueeze(0),
        torch.tensor([trunk.speculation], dtype=torch.int64).view(1, n),
        torch.tensor([n]),
        torch.tensor([trunk.temperature]),
        engine.branches,
    )
    pairs = zip(expected.accepted[0].tolist(), expected.bonus[0].tolist(), strict=True)
    assert {(branch.accepted, branch.bonus) for branch in trunk.branches} == {pair for pair in pairs if pair[1] >= 0}


def check_drafts(engine: DraftEngine, trunk: Trunk) -> None:
    """Every branch is the oracle's greedy continuation of committed text, accepted drafts and bonus token."""
    depths = engine.drafts_of(trunk)
    for i, branch in enumerate(trunk.branches):
        text = [*trunk.tokens, *trunk.speculation[: branch.accepted], branch.bonus]
        assert [int(depth[i]) for depth in depths] == fake_of(engine).greedy_continuation(text, len(depths))
