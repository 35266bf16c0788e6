"""What must hold of an engine at any time, checked against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.unit.drafting.fake_model import FakeModel
from vllm_saguaro.algorithm import outcomes, position_noise
from vllm_saguaro.algorithm.calibration import class_of
from vllm_saguaro.algorithm.noise import KeySeeds, NoiseSeeds, gumbel_of_all
from vllm_saguaro.algorithm.sampling import deflate
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.drafting.trunk import PLAIN, Deflation, Drawing, Tree, Trunk
from vllm_saguaro.messages import Noise, Proposals, Sampling

GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8)
COUPLED = Sampling(temperature=0.8, noise=Noise.KEY, seed=1234)
SEEDED = Sampling(temperature=1.2, noise=Noise.SEED, seed=7)
POSITIONED = Sampling(temperature=0.9, noise=Noise.POSITION, seed=-99)
PROMPT = [(7 * i + 3) % 40 for i in range(11)]


def make_engine(
    model: FakeModel, num_speculative_tokens: int = 3, branches: int = 4, fan_out: str = "ranked", **options: Any
) -> DraftEngine:
    """An engine whose own draws are the same in every run; `options` are those of `DraftEngine`."""
    return DraftEngine(model, num_speculative_tokens, branches, fan_out, **{"seed": 5, **options})


def fake_of(engine: DraftEngine) -> FakeModel:
    assert isinstance(engine.model, FakeModel)
    return engine.model


def prefill(engine: DraftEngine, trunks: Sequence[Trunk], most: int = 64) -> None:
    """Bring the KV of all trunks up to date; each must come forward in every forward."""
    while waiting := [trunk for trunk in trunks if trunk.pending()]:
        before = [trunk.valid for trunk in waiting]
        engine.extend(waiting, most)
        assert all(trunk.valid > valid for trunk, valid in zip(waiting, before, strict=True))


def ready(engine: DraftEngine, prompt: Sequence[int] = PROMPT, sampling: Sampling = GREEDY) -> Trunk:
    """A request whose KV is complete."""
    trunk = engine.admit(list(prompt), replace(sampling, prompt_length=len(prompt)))
    prefill(engine, [trunk])
    return trunk


def grown(engine: DraftEngine, trunks: list[Trunk], depth: int | None = None) -> Tree:
    """The tree of these trunks, `depth` tokens deep (None: K)."""
    tree = engine.fork(trunks)
    assert tree is not None
    for _ in range(engine.num_speculative_tokens if depth is None else depth):
        engine.grow(tree)
    return tree


def speculation(engine: DraftEngine, trunk: Trunk, branch: int, depth: int | None = None) -> list[int]:
    """The drafts of a branch, the first `depth` of them (None: all)."""
    return [int(step[branch]) for step in engine.drafts_of(trunk)[:depth]]


def check_blocks(engine: DraftEngine, trunks: Sequence[Trunk]) -> None:
    """No block is lost and none has two owners. Whatever is free is wiped, so that nobody can go on reading it."""
    held = [block for trunk in trunks for block in trunk.blocks]
    held += [block for trunk in trunks for branch in trunk.branches for block in branch.blocks]
    assert len(set(held)) == len(held), "a block has two owners"
    assert engine.pool.num_free + len(held) == engine.pool.num_blocks, "a block was lost"
    fake_of(engine).wipe(set(range(engine.pool.num_blocks)) - set(held))


# ---- the oracle -----------------------------------------------------------------------------------------------------


def noise_at(sampling: Sampling, position: int, vocabulary: int) -> torch.Tensor:
    """The noise [V] float64 that a coupled request has at a text position."""
    if sampling.noise is Noise.POSITION:
        stem = torch.tensor([position_noise.stem_of(sampling.seed, position)])
        return position_noise.gumbel_of_all(stem, vocabulary)[0]
    seeds = KeySeeds(sampling.seed) if sampling.noise is Noise.KEY else NoiseSeeds(sampling.seed)
    return gumbel_of_all(torch.tensor([seeds.at(position - sampling.prompt_length)]), vocabulary)[0]


def next_draft(model: FakeModel, sampling: Sampling, text: Sequence[int]) -> int:
    """The draft after this text, of a request whose drafts are no matter of chance."""
    logits = model.logits_after(text)
    if sampling.coupled:
        # argmax_t log q_t + g_t
        return int((logits.double() / sampling.temperature + noise_at(sampling, len(text), len(logits))).argmax())
    return int(logits.argmax())


def continuation(model: FakeModel, sampling: Sampling, text: Sequence[int], count: int) -> list[int]:
    """The next `count` drafts after this text, from the list alone."""
    longer = list(text)
    for _ in range(count):
        longer.append(next_draft(model, sampling, longer))
    return longer[len(text) :]


def dense(q: Proposals, vocabulary: int) -> torch.Tensor:
    """A published q [..., M] over the whole vocabulary [..., V]."""
    probabilities = torch.from_numpy(q.probabilities)
    empty = torch.zeros(*probabilities.shape[:-1], vocabulary)
    return empty.scatter(-1, torch.from_numpy(q.tokens).long(), probabilities)


def drawn_from(
    model: FakeModel, sampling: Sampling, text: Sequence[int], fan_out: int = 0, c: float = 1.0
) -> torch.Tensor:
    """q' [V] after this text, by the definition: softmax(z / T), the F likeliest times C. For a vocabulary of few."""
    assert not sampling.cut
    q = (model.logits_after(text) / sampling.temperature).softmax(-1)
    q, order = q.sort(descending=True)
    q[:fan_out] *= c
    return torch.zeros_like(q).scatter(0, order, q / q.sum())


def expected_outcomes(engine: DraftEngine, trunk: Trunk) -> list[tuple[int, int]]:
    """The likeliest outcomes (k, t*) by the logits that the oracle has after each prefix, likeliest first."""
    model, n, sampling = fake_of(engine), len(trunk.speculation), trunk.sampling
    share = []
    for k in range(n + 1):
        prefix = trunk.tokens + trunk.speculation[:k]
        z = model.logits_after(prefix) / (1.0 if sampling.greedy else sampling.temperature)
        if sampling.coupled:
            z = 1.5 * (z + noise_at(sampling, len(prefix), len(z)).float())
        share.append(z.softmax(-1))
    q, tokens = torch.stack(share).sort(dim=-1, descending=True)
    fan_out = torch.tensor((list(trunk.deflation.fan_out) + [0] * (n + 1))[: n + 1])
    certain = engine.drawer.kind(sampling) is Drawing.CERTAIN or trunk.backup
    cls = class_of(sampling.temperature, sampling.coupled, certain, trunk.backup)
    beliefs = outcomes.Beliefs(
        tokens=tokens[None],
        share=q[None],
        drawn=deflate(q, fan_out, torch.full((n + 1,), trunk.deflation.c))[None],
        drafts=torch.tensor([trunk.speculation], dtype=torch.int64).view(1, n),
        n=torch.tensor([n]),
        classes=torch.tensor([cls]),
    )
    table = engine.forecaster.calibration.table()
    found = outcomes.choose(engine.forecaster.fan_out, beliefs, outcomes.scores(beliefs), table, engine.branches)
    order = found.probability[0].argsort(descending=True, stable=True)
    pairs = zip(found.accepted[0, order].tolist(), found.bonus[0, order].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] >= 0]


# ---- against the oracle ---------------------------------------------------------------------------------------------


def check_predictions(engine: DraftEngine, trunk: Trunk) -> None:
    """The branches are the likeliest outcomes."""
    assert {(branch.accepted, branch.bonus) for branch in trunk.branches} == set(expected_outcomes(engine, trunk))


def check_drafts(engine: DraftEngine, trunk: Trunk) -> None:
    """Every branch continues committed text, accepted drafts and bonus token as the oracle does.

    Where drafts are sampled, what is published is the oracle's q', and each token is one that it can give.
    """
    depths, model = engine.drafts_of(trunk), fake_of(engine)
    deflation: Deflation = trunk.tree.rule.deflation if trunk.tree is not None else PLAIN
    fan_out = list(deflation.fan_out) + [0] * len(depths)
    sampled = engine.drawer.kind(trunk.sampling) is Drawing.SAMPLED
    published = [engine.q_of(trunk, depth) for depth in range(len(depths))]
    assert all((q is not None) == sampled for q in published)
    for i, branch in enumerate(trunk.branches):
        text = [*trunk.tokens, *trunk.speculation[: branch.accepted], branch.bonus]
        drafts = [int(depth[i]) for depth in depths]
        if not sampled:
            assert drafts == continuation(model, trunk.sampling, text, len(depths))
            continue
        for depth, (draft, q) in enumerate(zip(drafts, published, strict=True)):
            assert q is not None
            got = dense(q, model.vocab_size)[i]
            expected = drawn_from(model, trunk.sampling, text, fan_out[depth], deflation.c)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
            assert got[draft] > 0
            text.append(draft)
