"""The run itself: the servers take turns, A B C A B C, with the same prompts."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from vllm_saguaro.benchmark import counters, provenance
from vllm_saguaro.benchmark.counters import GENERATED, RUNNING, WAITING, count
from vllm_saguaro.benchmark.progress import Progress
from vllm_saguaro.benchmark.records import digest
from vllm_saguaro.benchmark.served.client import About, ServerError, about, ask, counted_by, open_session, others_tokens
from vllm_saguaro.benchmark.served.records import Answer, Load, Repetition, Report, Run
from vllm_saguaro.benchmark.served.settings import Settings
from vllm_saguaro.benchmark.served.summary import summarise
from vllm_saguaro.benchmark.settings import SettingsError, allowed_cores

WARM_UP_TOKENS = 24
_LOOKS = 20
_BETWEEN_LOOKS = 0.05
Warn = Callable[[str], None]


def measure(settings: Settings, progress: Progress | None = None, warn: Warn = print) -> Report:
    """Ask every server, repetition by repetition. A warning goes to `warn` when it becomes known, and into the report.

    Raises SettingsError and ServerError before the first text is asked for where it cannot work, and ServerError where
    a server fails later: a speed with failures among it would say nothing.
    """
    settings.check()
    return asyncio.run(_Session(settings, progress or Progress(), warn).run())


class _Session:
    def __init__(self, settings: Settings, progress: Progress, warn: Warn) -> None:
        self._settings, self._progress, self._warn = settings, progress, warn
        self._prompts = settings.read_prompts()
        self._reference: dict[tuple[Load, int], list[Answer]] = {}
        self._notes: list[str] = []
        self._run = secrets.token_hex(8)

    async def run(self) -> Report:
        """All of it."""
        settings = self._settings
        async with open_session() as session:
            servers = [await about(session, name, url, settings.model) for name, url in settings.servers]
            self._check(servers)
            origin = provenance.collect(allowed_cores(), settings.without_secrets(sys.argv))
            runs = [Run(server.name, load) for load in settings.loads() for server in servers]
            self._progress.begin(settings.repetitions * len(runs))
            try:
                for number in range(settings.repetitions):
                    for load in settings.loads():
                        for server in servers:
                            self._progress.step(f"{number + 1}/{settings.repetitions} {load.name}: {server.name}")
                            run = next(run for run in runs if (run.server, run.load) == (server.name, load))
                            run.repetitions.append(await self._repetition(session, server, load, number))
            finally:
                self._progress.end()
        self._judge_reference(servers[0])
        self._judge_drafts(servers, runs)
        told = {server.name: dataclasses.asdict(server) for server in servers}
        for each, url in settings.to_json()["servers"].items():
            told[each]["url"] = url
        report = Report(origin, settings.to_json(), told, runs, self._notes)
        report.summaries = {name: summary.to_json() for name, summary in summarise(runs).items()}
        return report

    def _check(self, servers: Sequence[About]) -> None:
        for server in servers:
            if server.longest is not None and self._settings.tokens >= server.longest:
                raise SettingsError(
                    f"--tokens {self._settings.tokens}: {server.name} holds texts of {server.longest} tokens, prompt "
                    "included: write fewer"
                )
            if not server.has_counters:
                self._note(f"{server.name} shows no /metrics: no hit rate and no acceptance of it")
        roots = {server.root for server in servers}
        if len(roots) > 1:
            self._note(f"the servers serve different models ({', '.join(sorted(roots))}): ratios compare these, too")

    async def _repetition(self, session: aiohttp.ClientSession, server: About, load: Load, number: int) -> Repetition:
        """A warm-up that is not counted, then all prompts."""
        await self._look_for_others(session, server)
        warm = self._prompts[: min(2 * load.concurrency, len(self._prompts))]
        warm_up_tokens = min(WARM_UP_TOKENS, self._settings.tokens)
        await self._all(session, server, load, warm, warm_up_tokens, f"warm-{number}")
        before = await _settled(session, server)
        begin = time.perf_counter()
        answers = await self._all(session, server, load, self._prompts, self._settings.tokens, f"measured-{number}")
        wall = time.perf_counter() - begin
        tokens = sum(answer.count for answer in answers)
        counted = counters.difference(await _settled(session, server), before)
        if count(counted, GENERATED) < 0:
            raise ServerError(
                f"{server.name} was started anew while it was measured: look into its log, and measure again"
            )
        others = others_tokens(counted, tokens)
        if others:
            self._note(f"{server.name} made {others} tokens for others while it was measured ({load.name})")
        return Repetition(
            wall,
            tokens,
            [answer.first for answer in answers],
            [gap for answer in answers for gap in answer.gaps],
            [answer.of_a_token for answer in answers if answer.of_a_token is not None],
            [digest(answer.content) for answer in answers],
            {name: value for name, value in counted.items() if name.startswith(counters.PREFIXES)},
            self._compared(server, load, number, answers),
        )

    async def _look_for_others(self, session: aiohttp.ClientSession, server: About) -> None:
        now = await _settled(session, server)
        busy = round(count(now, RUNNING) + count(now, WAITING))
        if busy:
            self._note(f"{server.name} had {busy} requests of others before a repetition: its times are too long")

    async def _all(
        self,
        session: aiohttp.ClientSession,
        server: About,
        load: Load,
        prompts: Sequence[str],
        tokens: int,
        salt: str,
    ) -> list[Answer]:
        """So many at a time: who has an answer takes the next prompt."""
        answers: dict[int, Answer] = {}
        waiting = iter(enumerate(prompts))

        async def one_after_the_other() -> None:
            for at, prompt in waiting:
                body = self._body(server, load, prompt, tokens, salt)
                answers[at] = await ask(session, server, body, self._settings.timeout)
                if answers[at].count != tokens:
                    raise ServerError(
                        f"{server.name} made {answers[at].count} tokens of {tokens}: are prompt and text longer than "
                        "its --max-model-len, or does it not know ignore_eos?"
                    )

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(load.concurrency):
                    group.create_task(one_after_the_other())
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
        return [answers[at] for at in range(len(prompts))]

    def _body(self, server: About, load: Load, prompt: str, tokens: int, salt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": server.model,
            **({"messages": [{"role": "user", "content": prompt}]} if self._settings.chat else {"prompt": prompt}),
            "max_tokens": tokens,
            "temperature": load.temperature,
            "ignore_eos": True,  # every server makes the same number of tokens
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if not self._settings.prefix_cache:
            body["cache_salt"] = f"{self._run} {load.name} {salt}"  # an earlier run's prompts may be there, too
        return body

    def _compared(self, server: About, load: Load, number: int, answers: Sequence[Answer]) -> dict[int, int] | None:
        """Greedy texts against those of the first server in the same repetition; of the first, with its first."""
        if load.temperature > 0:
            return None
        if server.name == self._settings.servers[0][0]:
            self._reference[load, number] = list(answers)
            return differing(answers, self._reference[load, 0])
        return differing(answers, self._reference[load, number])

    def _judge_reference(self, first: About) -> None:
        """Where the first server does not repeat itself, others need not have its text either."""
        for load in dict.fromkeys(load for load, _ in self._reference):
            alone = self._reference[load, 0]
            unsteady = {
                at for (of, _), answers in self._reference.items() if of == load for at in differing(answers, alone)
            }
            if unsteady:
                self._note(
                    f"{first.name} itself gives another greedy text for {len(unsteady)} of {len(alone)} prompts "
                    f"from one repetition to the next ({load.name}): its batches are not invariant"
                )

    def _judge_drafts(self, servers: Sequence[About], runs: Sequence[Run]) -> None:
        """Numbers say nothing of a method that did not work."""
        for run in runs:
            saguaro = any(server.is_saguaro for server in servers if server.name == run.server)
            if saguaro and not any(count(one.counters, counters.HITS) for one in run.repetitions):
                self._note(f"{run.name}: no table was ever there when it was needed; is the draft side running?")

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            self._warn(text)


async def _settled(session: aiohttp.ClientSession, server: About) -> dict[str, float]:
    """The server's counters once they stand still: vLLM sends the end of a text before it has counted it.

    Raises ServerError where they cannot be read any more: without them the rest would count from the server's start.
    """
    if not server.has_counters:
        return {}
    now = await counted_by(session, server.name, server.url)
    for _ in range(_LOOKS):
        await asyncio.sleep(_BETWEEN_LOOKS)
        before, now = now, await counted_by(session, server.name, server.url)
        if count(before, GENERATED) == count(now, GENERATED) and not count(now, RUNNING):
            break
    return now


def differing(answers: Sequence[Answer], others: Sequence[Answer]) -> dict[int, int]:
    """The prompts whose texts are not the same, each with the first place at which they are not.

    A place is a token where both have ids, else a character.
    """
    found = {}
    for at, (mine, theirs) in enumerate(zip(answers, others, strict=True)):
        if mine.tokens is not None and theirs.tokens is not None:
            place = _parting(mine.tokens, theirs.tokens)
        else:
            place = _parting(mine.text, theirs.text)
        if place is not None:
            found[at] = place
    return found


def _parting(one: Sequence[object], other: Sequence[object]) -> int | None:
    """The first place at which two are not the same; None where they are."""
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))
