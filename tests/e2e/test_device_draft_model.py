"""vLLM's draft model driven from the device, on the CPU: its drafts are those of the host engine over the same one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.e2e.harness import DRAFT, prompts, tokenize
from tests.unit.drafting.device_driver import World
from vllm_saguaro.drafting.engine import DraftEngine
from vllm_saguaro.messages import Sampling

pytestmark = pytest.mark.engine

K, SLOTS, N = 4, 3, 6


@pytest.fixture(scope="module")
def options() -> Any:
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig
    from vllm_saguaro.vllm_hooks.stream_draft import StreamOptions

    config = DraftModelConfig(
        model=str(DRAFT),
        dtype="float32",
        max_length=160,
        max_rows=1,
        max_tokens=64,
        kv_cache_bytes=0,
        enforce_eager=True,
    )
    return StreamOptions(config, slots=SLOTS, num_speculative_tokens=K, branches=N, seed=3)


@pytest.fixture(scope="module")
def host(options: Any) -> Iterator[DraftEngine]:
    from vllm_saguaro.vllm_hooks.draft_model import VllmDraftModel

    model = VllmDraftModel(replace(options.model, max_rows=32, kv_cache_bytes=64 << 20))
    model.warm_up()
    yield DraftEngine(model, K, N)
    model.close()


class RealWorld(World):
    """The driver over vLLM's model; the host engine is the oracle."""

    def __init__(self, options: Any, host: DraftEngine) -> None:
        from vllm_saguaro.vllm_hooks.stream_draft import make_stream_draft

        self.draft = make_stream_draft(options)
        self.engine, self.drafts, self.host = self.draft.engine, K, host
        self.requests, self.hits, self.tables_seen, self._names = {}, 0, 0, 0

    def check(self) -> None:
        for slot, request in self.requests.items():
            for (k, bonus), drafts, _ in self.table(slot) if request.sampling.greedy else ():
                text = [*request.text, *request.drafts[:k], bonus]
                assert drafts == continuation(self.host, text), "not what the host engine drafts"
                self.tables_seen += 1


def continuation(host: DraftEngine, text: Sequence[int]) -> list[int]:
    """What the host engine drafts after this text, greedily."""
    trunk = host.admit(list(text[:-1]), Sampling())
    while trunk.pending():
        host.extend([trunk], 64)
    tree = host.pursue([(trunk, 0, text[-1])], K)
    assert tree is not None
    while not tree.finished:
        host.grow(tree)
    drafts = [int(step[0]) for step in host.drafts_of(trunk)]
    host.release(trunk)
    return drafts


@pytest.fixture
def world(options: Any, host: DraftEngine) -> Iterator[RealWorld]:
    world = RealWorld(options, host)
    yield world
    world.draft.close()


def test_drafts_of_all_branches_are_those_of_the_host_engine(world: RealWorld) -> None:
    """Over block boundaries (32 tokens), with hits, misses, a prompt in pieces, and a slot that is used again."""
    texts = [tokenize(prompt)[:60] for prompt in prompts()[:3]]
    texts[1] = (texts[1] * 20)[:90]  # two pieces, of 64 tokens and of the rest with what comes meanwhile
    for slot in (0, 2):
        world.admit(slot, texts[slot])
    world.step({0: (0, 300), 2: (0, 301)})
    world.admit(1, texts[1])
    for i in range(9):
        found: dict[int, tuple[int, int] | None] = {}
        for slot in (1, 2, 0):
            table = world.table(slot)
            hit = table and (i + slot) % 4
            found[slot] = table[(i + slot) % len(table)][0] if hit else (0, 310 + i)
        world.step(found)
        if i == 5:
            world.release(2)
            world.admit(2, texts[2][:5])
    assert world.hits > 8
    assert world.tables_seen > 80


def test_drafts_are_drawn_from_what_is_told(world: RealWorld) -> None:
    prompt = tokenize(prompts()[3])[:40]
    world.admit(0, prompt, Sampling(temperature=0.8))
    world.step({0: (0, 300)})
    key, drafts, branch = world.table(0)[0]
    state, vocabulary = world.engine.state, world.engine.model.vocab_size
    trunk = world.host.admit([*prompt, 300, key[1]], Sampling())
    world.host.extend([trunk], 64)
    assert trunk.hidden is not None
    z = world.host.model.logits(trunk.hidden[-1:])[0] / 0.8
    world.host.release(trunk)
    expected = z.masked_fill(z < z.topk(64).values[-1], -torch.inf).softmax(-1)
    q = torch.zeros(vocabulary).scatter(0, state.q_tokens[0, branch, 0].long(), state.log_q[0, branch, 0].exp())
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=1e-3)
    assert q[drafts[0]] > 0


def test_what_is_held_is_weights_and_kv_and_more(world: RealWorld) -> None:
    model = world.engine.model
    weights = (DRAFT / "model.safetensors").stat().st_size
    assert model.resident_bytes > weights
    assert world.draft.resident_bytes > model.resident_bytes
