"""A speculator with a draft side that answers what it is given, for the tests of the target side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Admit, Outcome, Proposals, Sampling, Stamp, Step, Table, Want
from vllm_saguaro.placement.channel import Channel
from vllm_saguaro.policy import Policy
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.turn import Verified

K = 3
PROMPT = [1, 2, 3, 4, 5]


class FakeChannel:
    """A draft side that remembers what it was told and answers what it was given."""

    max_length = 40
    resident_bytes = 0
    sampling_c: float | None = None

    def __init__(self, slots: int) -> None:
        self.shards: Sequence[range] = (range(slots),)
        self.alive = True
        self.life = 1
        self.stalled_seconds = 0.0
        self.taking = True
        self.steps: list[Step] = []
        self.tables: dict[int, Table] = {}
        self.asked_q: list[tuple[Stamp, int, int, int]] = []
        self.on_wants: Callable[[Sequence[Want]], None] = lambda wants: None
        self.on_read: Callable[[int], None] = lambda slot: None

    def epoch(self, slot: int) -> int:
        return self.life if self.alive else 0

    def post(self, step: Step) -> bool:
        if not self.alive or not self.taking:
            return False
        self.steps.append(step)
        if step.wants:
            self.on_wants(step.wants)
        return True

    def read(self, slot: int) -> Table | None:
        self.on_read(slot)
        return self.tables.get(slot) if self.alive else None

    def proposals(self, stamp: Stamp, version: int, branch: int, depth: int) -> Proposals | None:
        self.asked_q.append((stamp, version, branch, depth))
        return Proposals(np.full((depth, 1), branch, np.int32), np.ones((depth, 1), np.float32))

    def wait_until_ready(self) -> None:
        pass

    def close(self) -> None:
        self.alive = False


class Bench:
    """A speculator, its fake draft side, its counters, and the text of each request."""

    def __init__(self, slots: int = 2, policy: Policy | None = None, channel: FakeChannel | None = None) -> None:
        self.channel = FakeChannel(slots) if channel is None else channel
        self.page = CounterPage()
        self.policy = policy if policy is not None else Policy(K, "none", adaptive=False)
        told: Channel = self.channel
        log = logging.getLogger("saguaro-test")
        self.speculator = Speculator(told, K, self.page, log, self.policy)
        self.texts: dict[str, list[int]] = {}
        self.asked: list[str] = []
        """Requests whose tokens were asked for."""
        self.guesses: dict[str, list[int]] = {}
        """What the text of a request suggests; nothing where it is not named."""
        self.guessed: list[tuple[str, int]] = []
        """Requests whose text was searched, and for how many tokens."""

    def arrive(self, request_id: str, tokens: Sequence[int] = PROMPT, temperature: float = 0.5) -> None:
        self.texts[request_id] = list(tokens)
        self.speculator.begin_step([(request_id, tokens, Sampling(temperature))], [])

    def row(self, request_id: str, *sampled: int, verified: int | None = None, greedy: bool = True) -> Verified:
        """One row of the next step; all that was verified was accepted, unless it is said otherwise."""
        text = self.texts[request_id]
        text += sampled

        def tokens() -> list[int]:
            self.asked.append(request_id)
            return list(text)

        def guess(most: int) -> list[int]:
            self.guessed.append((request_id, most))
            return self.guesses.get(request_id, [])[:most]

        in_pass = max(len(sampled) - 1, 0) if verified is None else verified
        sampling = Sampling(0.25, top_k=7)
        return Verified(request_id, list(sampled), in_pass, len(text), tokens, lambda: sampling, guess, greedy)

    def propose(self, *rows: Verified, most: int | None = None, tokens_in: int | None = None) -> list[list[int]]:
        return self.speculator.propose(rows, most, tokens_in)

    def table(self, stamp: Stamp, *outcomes: tuple[int, int], depth: int = K, version: int = 0) -> None:
        """A table of these outcomes (k, t*); the drafts of branch i are i0, i1, i2."""
        drafts = [[10 * i + d for i in range(len(outcomes))] for d in range(depth)]
        accepted, bonus = [k for k, _ in outcomes], [t for _, t in outcomes]
        self.channel.tables[stamp.slot] = Table(stamp, accepted, bonus, drafts, 0.003, version=version)

    def count(self) -> dict[str, float]:
        found = {cause.value: self.page.value(counter) for cause, counter in counters.MISSES.items()}
        found |= {"hits": self.page.value(counters.HITS), "late tables": self.page.value(counters.LATE_TABLES)}
        found |= {kind: self.page.value(counter) for kind, counter in counters.BACKUPS.items()}
        return {name: value for name, value in found.items() if value}


def arrived(policy: Policy | None = None, **texts: Sequence[int]) -> Bench:
    bench = Bench(policy=policy)
    for request_id, tokens in (texts or {"a": PROMPT}).items():
        bench.arrive(request_id, tokens)
    return bench


def admitted(bench: Bench) -> list[Admit]:
    return [admit for step in bench.channel.steps for admit in step.admits]


def outcomes(bench: Bench) -> list[Outcome]:
    return [outcome for step in bench.channel.steps for outcome in step.outcomes]


def wants(bench: Bench) -> list[Want]:
    return [want for step in bench.channel.steps for want in step.wants]


def released(bench: Bench) -> list[Stamp]:
    return [release.stamp for step in bench.channel.steps for release in step.releases]
