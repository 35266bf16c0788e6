from __future__ import annotations

import logging

import pytest

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Admit, Miss, Stamp, Step
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.speculator import Speculator, Verified

K, BRANCHES = 4, 8
SHAPE = MailboxShape(slots=3, branches=BRANCHES, num_speculative_tokens=K, ring_bytes=1 << 16)
ADMIT = Step(admits=[Admit(Stamp(1, 1, 0), 0.0, (3, 1, 4, 1, 5))])


def inline(model: FakeModel | None = None) -> InlineChannel:
    model = model or FakeModel(num_blocks=512, max_length=200)
    return InlineChannel(lambda: make_engine(model, K, BRANCHES), SHAPE)


def test_a_table_is_finished_when_post_returns() -> None:
    channel: Channel = inline()
    channel.wait_until_ready()
    assert channel.alive
    assert channel.max_length == 200
    assert channel.post(ADMIT)
    table = channel.read(1)
    assert table is not None
    assert (table.stamp, len(table.drafts), len(table.bonus)) == (Stamp(1, 1, 0), K, BRANCHES)


def test_a_step_that_is_too_large_is_refused() -> None:
    assert not inline().post(Step(admits=[Admit(Stamp(0, 1, 0), 0.0, tuple([1] * 20_000))]))


def test_a_closed_channel_takes_and_gives_nothing() -> None:
    channel = inline()
    channel.post(ADMIT)
    channel.close()
    channel.close()
    assert not channel.alive
    assert not channel.post(ADMIT)
    assert channel.read(1) is None


def test_a_step_that_does_not_decode_does_not_reach_the_target() -> None:
    """As in the process placement: it is dropped and counted, and nobody raises."""
    channel = inline()
    channel.post(Step(admits=[Admit(Stamp(0, 1, 0), 0.0, (1, -1))]))
    assert channel.post(ADMIT)
    assert channel.read(1) is not None


@pytest.mark.parametrize("num_blocks", [512, 40])
@pytest.mark.parametrize("agreement", [0.75])
def test_the_emitted_text_is_the_targets_greedy_text(num_blocks: int, agreement: float) -> None:
    """Speculator, channel, loop and engine in one run: lossless, and worth its while."""
    model = FakeModel(num_blocks=num_blocks, max_length=200)
    target = SimulatedTarget(model, agreement)
    page = CounterPage()
    speculator = Speculator(inline(model), SHAPE.slots, K, page, logging.getLogger("test"))
    prompts = {f"r{i}": [(5 * i + 7 * j) % 40 for j in range(3 + 4 * i)] for i in range(3)}
    texts = {name: list(prompt) for name, prompt in prompts.items()}
    drafts: dict[str, list[int]] = {name: [] for name in prompts}
    speculator.begin_step([(name, prompt, 0.0) for name, prompt in prompts.items()], [])
    rounds = emitted = 0
    for _ in range(25):
        rows = []
        for name, text in texts.items():
            sampled = target.verify(text, drafts[name])
            text += sampled
            rounds, emitted = rounds + 1, emitted + len(sampled)
            rows.append(Verified(name, sampled, len(text), lambda text=text: text, lambda: 0.0))  # type: ignore[misc]
        speculator.begin_step([], [])
        drafts = dict(zip(texts, speculator.propose(rows), strict=True))
    for name, text in texts.items():
        prompt = prompts[name]
        assert text[len(prompt) :] == target.greedy_text(prompt, len(text) - len(prompt))
    hits, misses = page.value(counters.HITS), sum(page.value(counters.MISSES[cause]) for cause in Miss)
    assert hits > 0
    assert misses > 0
    assert hits + misses == rounds == 75
    assert emitted / rounds > (1.5 if num_blocks == 512 else 1.0)
    if num_blocks == 512:
        assert page.hit_rate > 0.5
        assert page.value(counters.MISSES[Miss.LATE]) == 0
