from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro import counters
from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.drafting.loop import DraftLoop
from vllm_saguaro.messages import Admit, Miss, Noise, Sampling, Stamp, Step, Work
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.mailbox import MailboxShape
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.turn import Verified

K, BRANCHES = 4, 8
SHAPE = MailboxShape(slots=3, branches=BRANCHES, num_speculative_tokens=K, ring_bytes=1 << 16, support=SUPPORT)
ADMIT = Step(admits=[Admit(Stamp(1, 1, 0), Sampling(), (3, 1, 4, 1, 5))])


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


def test_rounds_are_told_where_a_trace_is_asked_for() -> None:
    waits: list[tuple[float, float]] = []
    shape = dataclasses.replace(SHAPE, rounds=4)
    model = FakeModel(num_blocks=512, max_length=200)
    channel = InlineChannel(
        lambda: make_engine(model, K, BRANCHES), shape, lambda began, ended: waits.append((began, ended))
    )
    before = time.perf_counter()
    channel.post(ADMIT)
    (wait,) = waits
    (one,) = channel.rounds()
    assert (one.work, one.rows, one.branches) == (Work.ROUND, 1, BRANCHES)
    assert before <= wait[0] <= one.began / 1e9
    assert one.ended / 1e9 <= wait[1]
    assert channel.rounds() == []


def test_no_rounds_are_told_where_none_is_asked_for() -> None:
    channel = inline()
    channel.post(ADMIT)
    assert channel.rounds() == []


def test_a_step_that_is_too_large_is_refused() -> None:
    assert not inline().post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), tuple([1] * 20_000))]))


def test_a_closed_channel_takes_and_gives_nothing() -> None:
    channel = inline()
    channel.post(ADMIT)
    channel.close()
    channel.close()
    assert not channel.alive
    assert not channel.post(ADMIT)
    assert channel.read(1) is None
    assert channel.proposals(Stamp(1, 1, 0), 2, 0, 1) is None


@pytest.mark.parametrize(("method", "drawn"), [("probabilistic", True), ("coupled", False), ("greedy", False)])
def test_the_q_of_drawn_drafts_comes_with_the_table(method: str, drawn: bool) -> None:
    model = FakeModel(num_blocks=512, max_length=200)
    channel: Channel = InlineChannel(lambda: make_engine(model, K, BRANCHES, method=method), SHAPE)
    sampling = Sampling(0.8, noise=Noise.KEY if method == "coupled" else Noise.UNKNOWN, seed=3, prompt_length=5)
    channel.post(Step(admits=[Admit(Stamp(1, 1, 0), sampling, (3, 1, 4, 1, 5))]))
    table = channel.read(1)
    assert table is not None
    for branch in range(BRANCHES):
        q = channel.proposals(table.stamp, table.version, branch, K)
        assert (q is not None) == drawn
        if q is not None:
            assert q.tokens.shape == q.probabilities.shape == (K, SHAPE.support)
            np.testing.assert_allclose(q.probabilities.sum(axis=1), 1, rtol=1e-5)
            for depth, token in enumerate(table.speculation(branch)):
                assert q.probabilities[depth, q.tokens[depth] == token].sum() > 0, "drawn from it"


@pytest.mark.parametrize(("method", "c"), [("probabilistic", 0.3), ("coupled", None), ("greedy", None)])
def test_the_c_of_drawn_drafts_is_told(method: str, c: float | None) -> None:
    model = FakeModel(num_blocks=512, max_length=200)
    deflations = Deflations(K, 0.3)
    channel: Channel = InlineChannel(
        lambda: make_engine(model, K, BRANCHES, method=method, deflations=deflations), SHAPE
    )
    assert channel.sampling_c is None
    sampling = Sampling(0.8, noise=Noise.KEY if method == "coupled" else Noise.UNKNOWN, seed=3, prompt_length=5)
    channel.post(Step(admits=[Admit(Stamp(1, 1, 0), sampling, (3, 1, 4, 1, 5))]))
    assert channel.sampling_c == c
    channel.post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), (3, 1, 4))]))
    assert channel.sampling_c == c, "a greedy request has none of its own"
    channel.close()
    assert channel.sampling_c is None


def test_a_step_that_does_not_decode_does_not_reach_the_target() -> None:
    """As in the process placement: it is dropped and counted, and nobody raises."""
    channel = inline()
    channel.post(Step(admits=[Admit(Stamp(0, 1, 0), Sampling(), (1, -1))]))
    assert channel.post(ADMIT)
    assert channel.read(1) is not None


@pytest.mark.parametrize("forwards", [0, 3])
def test_an_error_of_the_draft_ends_the_drafting_and_nothing_else(
    forwards: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    advance, left, told = DraftLoop.advance, iter(range(forwards)), list[int]()

    def breaks(loop: DraftLoop) -> bool:
        if next(left, None) is None:
            raise RuntimeError("a kernel that this core has not")
        return advance(loop)

    monkeypatch.setattr(DraftLoop, "advance", breaks)
    model = FakeModel(num_blocks=512, max_length=200)
    channel = InlineChannel(lambda: make_engine(model, K, BRANCHES), SHAPE, gave_up=lambda: told.append(1))
    for _ in range(2):
        assert not channel.post(ADMIT)
        assert not channel.alive
        assert channel.epoch(1) == 0
        assert channel.read(1) is None
        assert channel.sampling_c is None
    assert told == [1]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "decoding goes on without drafts" in caplog.text
    assert "a kernel that this core has not" in caplog.text
    channel.close()


def test_after_an_error_of_the_draft_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    page = CounterPage()
    speculator = Speculator(inline(), K, page, logging.getLogger("test"), Policy(K, "none", adaptive=False))
    text = [3, 1, 4, 1, 5]
    speculator.begin_step([("a", text, Sampling())], [])
    monkeypatch.setattr(DraftLoop, "submit", lambda loop, step: 1 / 0)
    for length in range(6, 10):
        row = Verified("a", [7], 0, length, lambda: text, Sampling)
        found = speculator.propose([row])
        speculator.begin_step([], [])
    assert found == [[]]
    assert page.value(counters.MISSES[Miss.ABSENT]) == 3


def guess_of(text: list[int]) -> Callable[[int], list[int]]:
    """A guess that is as good as any: what follows the last token where it stood first."""
    return lambda most: text[text.index(text[-1]) + 1 :][:most]


@pytest.mark.parametrize("num_blocks", [512, 40])
@pytest.mark.parametrize("agreement", [0.75])
@pytest.mark.parametrize("backup", ["none", "ngram", "jit"])
def test_the_emitted_text_is_the_targets_greedy_text(num_blocks: int, agreement: float, backup: str) -> None:
    """Speculator, channel, loop and engine in one run: lossless, and worth its while."""
    model = FakeModel(num_blocks=num_blocks, max_length=200)
    target = SimulatedTarget(model, agreement)
    page = CounterPage()
    speculator = Speculator(inline(model), K, page, logging.getLogger("test"), Policy(K, backup, adaptive=False))
    prompts = {f"r{i}": [(5 * i + 7 * j) % 40 for j in range(3 + 4 * i)] for i in range(3)}
    texts = {name: list(prompt) for name, prompt in prompts.items()}
    drafts: dict[str, list[int]] = {name: [] for name in prompts}
    speculator.begin_step([(name, prompt, Sampling()) for name, prompt in prompts.items()], [])
    rounds = emitted = unserved = 0
    for _ in range(25):
        rows = []
        for name, text in texts.items():
            sampled = target.verify(text, drafts[name])
            text += sampled
            rounds, emitted = rounds + 1, emitted + len(sampled)
            rows.append(Verified(name, sampled, len(drafts[name]), len(text), text.copy, Sampling, guess_of(text)))
        speculator.begin_step([], [])
        drafts = dict(zip(texts, speculator.propose(rows), strict=True))
        unserved += sum(not found for found in drafts.values())
    for name, text in texts.items():
        prompt = prompts[name]
        assert text[len(prompt) :] == target.greedy_text(prompt, len(text) - len(prompt))
    hits, misses = page.value(counters.HITS), sum(page.value(counters.MISSES[cause]) for cause in Miss)
    assert hits > 0
    assert misses > 0
    assert hits + misses == rounds == 75
    assert emitted / rounds > (1.5 if num_blocks == 512 else 1.0)
    served = {kind: page.value(counter) for kind, counter in counters.BACKUPS.items()}
    assert unserved == misses - sum(served.values())
    assert {kind for kind, count in served.items() if count} <= {backup}
    if num_blocks == 512:
        assert backup == "none" or served[backup] > 0
        assert page.hit_rate > 0.5
        assert page.value(counters.MISSES[Miss.LATE]) == 0
