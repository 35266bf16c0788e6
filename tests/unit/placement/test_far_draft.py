"""A draft side that is no child of ours, over the network and over passed memory: the same tables as inline, and an end
without a trace whichever side goes first."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.shared_names import held_names
from tests.unit.drafting.checks import make_engine
from tests.unit.drafting.simulated_target import SimulatedTarget
from tests.unit.placement.far_draft import MAX_LENGTH, SHAPE, VOCABULARY, C, draft, drafting, model
from tests.unit.placement.watching import becomes_idle, until, waits_apart
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.drafting.deflations import Deflations
from vllm_saguaro.messages import Admit, Noise, Outcome, Sampling, Stamp, Step, Table
from vllm_saguaro.placement import meeting, shared_memory
from vllm_saguaro.placement.channel import Channel, DraftFailed
from vllm_saguaro.placement.inline import InlineChannel
from vllm_saguaro.placement.layout import LayoutError
from vllm_saguaro.placement.meeting import knock
from vllm_saguaro.placement.network import NetworkChannel
from vllm_saguaro.placement.passed_memory import PassedMemoryChannel, PassedMemoryEnd
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.turn import Verified

ROOT = Path(__file__).resolve().parents[3]
K = SHAPE.num_speculative_tokens
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
Far = NetworkChannel | PassedMemoryChannel


def admit(generation: int = 1, sampling: Sampling = Sampling()) -> Step:  # noqa: B008
    return Step(admits=[Admit(Stamp(1, generation, 0), sampling, PROMPT)])


@pytest.fixture(params=["network", "passed memory"])
def channel(request: pytest.FixtureRequest) -> Iterator[Far]:
    network = request.param == "network"
    opened: Far = NetworkChannel("127.0.0.1", SHAPE) if network else PassedMemoryChannel(SHAPE)
    yield opened
    opened.close()


def table_of(channel: Channel, stamp: Stamp) -> Table:
    """The finished table of a round."""
    found: list[Table] = []

    def is_there() -> bool:
        table = channel.read(stamp.slot)
        found[:] = [table] if table is not None else []
        return table is not None and table.stamp == stamp and len(table.drafts) == K

    assert until(is_there)
    return found[0]


@contextlib.contextmanager
def process(channel: Far) -> Iterator[subprocess.Popen[str]]:
    """A draft side in a process that is no thread of ours."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.placement.far_draft"], cwd=ROOT, stdin=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        running.stdin.write(json.dumps(channel.invitation.to_dict()) + "\n")
        running.stdin.close()
        try:
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("method", ["coupled", "probabilistic", "greedy"])
def test_tables_and_their_q_are_those_of_the_inline_placement(channel: Far, method: str) -> None:
    deflations = Deflations(K, C)
    inline: Channel = InlineChannel(
        lambda: make_engine(model(), K, SHAPE.branches, method=method, deflations=deflations), SHAPE
    )
    noise = Noise.KEY if method == "coupled" else Noise.UNKNOWN
    sampling = Sampling(0.8, noise=noise, seed=3, prompt_length=len(PROMPT))
    with drafting(channel.invitation, method):
        channel.wait_until_ready()
        assert channel.max_length == MAX_LENGTH
        text = list(PROMPT)
        drafts: tuple[int, ...] = ()
        step = admit(sampling=sampling)
        for round_ in range(5):
            assert inline.post(step)
            assert channel.post(step)
            ours, theirs = table_of(channel, Stamp(1, 1, round_)), table_of(inline, Stamp(1, 1, round_))
            assert (ours.accepted, ours.bonus, ours.drafts) == (theirs.accepted, theirs.bonus, theirs.drafts)
            for branch in range(len(ours.bonus)):
                q = channel.proposals(ours.stamp, ours.version, branch, K)
                expected = inline.proposals(theirs.stamp, theirs.version, branch, K)
                assert (q is None) == (expected is None) == (method != "probabilistic")
                if q is not None and expected is not None:
                    np.testing.assert_array_equal(q.tokens, expected.tokens)
                    np.testing.assert_array_equal(q.probabilities, expected.probabilities)
            branch = max(range(len(ours.bonus)), key=lambda i: ours.accepted[i])
            text += [*drafts[: ours.accepted[branch]], ours.bonus[branch]]
            verified, drafts = len(drafts), ours.speculation(branch)
            found = Outcome(ours.stamp, ours.accepted[branch], ours.bonus[branch], len(text), drafts, verified)
            step = Step(outcomes=[found])
        assert channel.sampling_c == inline.sampling_c == (C if method == "probabilistic" else None)
        channel.close()
        assert channel.sampling_c is None


def test_the_emitted_text_is_the_targets_greedy_text(channel: Far) -> None:
    """However late a table is, and whatever is lost of it."""
    target = SimulatedTarget(model(), 0.75)
    policy = Policy(K, "jit", adaptive=False)
    speculator = Speculator(channel, K, CounterPage(), logging.getLogger("test"), policy)
    with drafting(channel.invitation):
        channel.wait_until_ready()
        prompts = {f"r{i}": [(5 * i + 7 * j) % VOCABULARY for j in range(3 + 4 * i)] for i in range(3)}
        texts = {name: list(prompt) for name, prompt in prompts.items()}
        drafts: dict[str, list[int]] = {name: [] for name in prompts}
        speculator.begin_step([(name, prompt, Sampling()) for name, prompt in prompts.items()], [])
        served = 0

        def all_there() -> bool:
            stamps = [request.stamp for request in speculator._requests.values()]
            tables = [channel.read(stamp.slot) for stamp in stamps]
            return all(t is not None and t.stamp == s and t.drafts for t, s in zip(tables, stamps, strict=True))

        for round_ in range(25):
            assert round_ % 3 or until(all_there)  # the other rounds take what there is
            rows = []
            for name, text in texts.items():
                sampled = target.verify(text, drafts[name])
                text += sampled
                rows.append(Verified(name, sampled, len(drafts[name]), len(text), text.copy, Sampling, lambda _: []))
            speculator.begin_step([], [])
            drafts = dict(zip(texts, speculator.propose(rows), strict=True))
            served += sum(bool(found) for found in drafts.values())
        assert served > 0
        for name, text in texts.items():
            prompt = prompts[name]
            assert text[len(prompt) :] == target.greedy_text(prompt, len(text) - len(prompt))
        channel.close()


def test_a_node_may_have_an_address_of_either_kind() -> None:
    try:
        channel = NetworkChannel("::1", SHAPE)
    except OSError:
        pytest.skip("no IPv6 here")
    with drafting(channel.invitation):
        channel.wait_until_ready()
        assert channel.post(admit())
        table_of(channel, Stamp(1, 1, 0))
        channel.close()


def test_before_the_draft_side_has_come_steps_are_refused_or_kept(channel: Far) -> None:
    assert channel.alive
    assert channel.read(1) is None or channel.read(1) == Table(Stamp(1, 0, 0), [], [], [])
    taken = channel.post(admit())
    with drafting(channel.invitation):
        channel.wait_until_ready()
        if taken:
            table_of(channel, Stamp(1, 1, 0))
        channel.close()


def test_the_draft_side_ends_when_the_channel_is_closed(channel: Far) -> None:
    with process(channel) as running:
        channel.wait_until_ready()
        assert channel.epoch(0) > 0
        channel.close()
        channel.close()
        assert running.wait(60) == 0
    assert not channel.alive
    assert channel.epoch(0) == 0
    assert not channel.post(admit())
    assert channel.read(1) is None
    assert channel.proposals(Stamp(1, 1, 0), 2, 0, 1) is None


def test_the_end_of_the_draft_side_is_noticed(channel: Far) -> None:
    with process(channel) as running:
        channel.wait_until_ready()
        assert channel.post(admit())
        table_of(channel, Stamp(1, 1, 0))
        running.kill()
        assert until(lambda: not channel.alive)
    assert not channel.post(admit(2))
    assert channel.read(1) is None
    assert channel.stalled_seconds == 0.0
    channel.close()


def test_a_step_that_the_draft_side_does_not_take_is_seen_to_wait(channel: Far) -> None:
    with process(channel) as running:
        channel.wait_until_ready()
        assert channel.post(admit())
        assert until(lambda: channel.stalled_seconds == 0.0)
        running.send_signal(signal.SIGSTOP)
        assert channel.post(admit(2))
        assert until(lambda: channel.stalled_seconds > 0.1)
        running.send_signal(signal.SIGCONT)
        table_of(channel, Stamp(1, 2, 0))
        assert until(lambda: channel.stalled_seconds == 0.0)


def test_steps_for_a_hanging_draft_side_find_no_room_after_a_while(channel: Far) -> None:
    with process(channel) as running:
        channel.wait_until_ready()
        running.send_signal(signal.SIGSTOP)
        posted = 0
        while channel.post(admit(posted + 1)):
            posted += 1
            assert posted * len(PROMPT) * 4 < SHAPE.ring_bytes
        assert posted > 100
        running.send_signal(signal.SIGCONT)
        assert until(lambda: channel.post(admit(posted + 1)))
        table_of(channel, Stamp(1, posted + 1, 0))


def test_a_sleeping_draft_side_wakes_for_a_step(channel: Far) -> None:
    with drafting(channel.invitation):
        channel.wait_until_ready()
        waited = []
        for generation in (1, 2, 3):
            time.sleep(0.2)
            posted = time.perf_counter()
            assert channel.post(admit(generation))
            table_of(channel, Stamp(1, generation, 0))
            waited.append(time.perf_counter() - posted)
        assert min(waited) < 0.5  # woken, and not found by the look once a second
        channel.close()


def test_an_idle_draft_side_uses_hardly_any_time(channel: Far) -> None:
    with process(channel) as running:
        channel.wait_until_ready()
        assert becomes_idle(running.pid)


def test_a_channel_that_nobody_comes_to_is_closed_in_a_moment(channel: Far) -> None:
    begun = time.monotonic()
    channel.close()
    assert time.monotonic() - begun < 2.0
    with pytest.raises(DraftFailed):
        channel.wait_until_ready()


def test_waiting_ends_when_another_thread_closes(channel: Far) -> None:
    waiting, failures = waits_apart(channel)
    time.sleep(0.05)
    channel.close()
    waiting.join(60)
    assert len(failures) == 1


def test_a_draft_side_that_ends_while_it_starts_is_a_failed_draft(channel: Far) -> None:
    knock(channel.invitation).close()
    with pytest.raises(DraftFailed, match="ended while it started"):
        channel.wait_until_ready()


def test_only_the_first_draft_side_is_let_in(channel: Far) -> None:
    with drafting(channel.invitation):
        channel.wait_until_ready()
        with pytest.raises((OSError, meeting.Refused)):
            draft(channel.invitation)
        assert channel.alive
        channel.close()


def open_files() -> list[str]:
    """What this process has open of ours."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if "saguaro" in name)


def test_a_draft_side_that_finds_no_mailbox_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a pool, which goes on with others."""

    def refuse(*_: Any, **__: Any) -> None:
        raise LayoutError("another version")

    with contextlib.closing(PassedMemoryChannel(SHAPE)) as channel:
        monkeypatch.setattr(shared_memory, "Mailbox", refuse)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LayoutError):
            PassedMemoryEnd(channel.invitation)
        assert until(lambda: not channel.alive)
        assert until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_draft_side_that_gets_no_thread_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with contextlib.closing(PassedMemoryChannel(SHAPE)) as channel:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            PassedMemoryEnd(channel.invitation)
        assert until(lambda: not channel.alive)
        assert until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize("network", [True, False])
def test_nothing_is_left(network: bool) -> None:
    names, files, threads = held_names(), open_files(), set(threading.enumerate())
    channel: Far = NetworkChannel("127.0.0.1", SHAPE) if network else PassedMemoryChannel(SHAPE)
    with process(channel) as running:
        channel.wait_until_ready()
        assert held_names() <= names
        assert open_files() != files or network
        channel.close()
        running.wait(60)
    assert open_files() == files
    assert set(threading.enumerate()) <= threads
