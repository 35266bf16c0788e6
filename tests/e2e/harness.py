"""The tests' end of `tests.e2e.engine`: starts it, reads its answers, compares texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "assets" / "pair" / "target"
DRAFT = TARGET / "draft"
PROMPTS = TARGET.parent / "prompts.jsonl"

Json = dict[str, Any]

BASE: Json = {
    "model": str(TARGET),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 192 << 20,
    "disable_log_stats": False,
    "seed": 0,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",  # so that a request id that is used again is the same one inside
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OF_SERVERS = {key: value for key, value in ENVIRONMENT.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
"""A server has its engine in a process of its own, as with its users."""


def saguaro(**options: Any) -> Json:
    return {"speculative_config": {"method": "saguaro", "num_speculative_tokens": 4, **options}}


@dataclass(frozen=True)
class Scenario:
    """What one scenario gave."""

    results: list[Json]
    records: list[tuple[str, int, list[int]]]
    metrics: dict[str, float]
    seconds: float
    ranks: list[dict[str, list[int]]]

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of every prompt's first output."""
        return [result["outputs"][0]["token_ids"] for result in self.results]

    @property
    def hits(self) -> float:
        return self.metrics["vllm:saguaro_hits"]

    @property
    def misses(self) -> float:
        return self._sum("vllm:saguaro_misses")

    @property
    def backups(self) -> float:
        """Misses that got drafts from elsewhere."""
        return self._sum("vllm:saguaro_backups")

    def _sum(self, name: str) -> float:
        """A counter over all its labels."""
        return sum(value for key, value in self.metrics.items() if key.startswith(name + "{"))

    @property
    def acceptance(self) -> float:
        """Accepted drafts a round, over the rounds that had drafts."""
        return self.metrics["vllm:spec_decode_num_accepted_tokens"] / self.metrics["vllm:spec_decode_num_drafts"]

    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)

    def first(self, count: int) -> Scenario:
        """What the first so many of its requests gave."""
        return dataclasses.replace(self, results=self.results[:count])

    def by_key(self) -> dict[str, Json]:
        return {result["key"]: result for result in self.results}


@dataclass
class EngineRun:
    """What one engine gave, and how its process ended."""

    scenarios: dict[str, Scenario]
    answer: Json
    log: str

    def __getitem__(self, name: str) -> Scenario:
        return self.scenarios[name]

    def log_lines(self, *words: str) -> list[str]:
        return [line for line in self.log.splitlines() if all(word in line for word in words)]


@dataclass
class Group:
    """A process with one engine after the other."""

    process: subprocess.Popen[str]
    log: Path
    engines: list[EngineRun] = field(default_factory=list)
    _log_read: int = 0

    def read_engine(self) -> EngineRun:
        """Wait for the next engine's answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise AssertionError(
                f"the engine ended without an answer (exit status {status}):\n{self.whole_log()[-6000:]}"
            )
        answer = json.loads(line)
        scenarios = {name: Scenario(**one) for name, one in answer["scenarios"].items()}
        log = self.whole_log()
        self.engines.append(EngineRun(scenarios, answer, log[self._log_read :]))
        self._log_read = len(log)
        return self.engines[-1]

    def whole_log(self) -> str:
        return self.log.read_text(errors="replace")


def environment_at_start() -> dict[str, str]:
    """What this process was started with. Importing vLLM, as other tests do here, adds to `os.environ`.

    Among it a preloaded libgomp: an engine that has it counts the cores before it goes to its own, and then runs two
    threads on one core, which wait for each other in turns of the scheduler: ten times slower.
    """
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (e.partition(b"=") for e in entries if e)}


@contextlib.contextmanager
def engines(specs: Sequence[Json], cpus: Sequence[int] = (), **environment: str) -> Iterator[Group]:
    """Start a process for these engines, on these cores (all, if none are named); it is gone when this ends."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                env={**environment_at_start(), **ENVIRONMENT, **environment},
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"engines": list(specs), "cpus": list(cpus)}))
        process.stdin.close()
        group = Group(process, log)
        try:
            yield group
        finally:
            process.kill()
            process.wait()


def run_engines(specs: Sequence[Json], cpus: Sequence[int] = (), **environment: str) -> list[EngineRun]:
    """Run all engines to their end, and insist that the process ended well."""
    with engines(specs, cpus, **environment) as group:
        runs = [group.read_engine() for _ in specs]
        assert group.process.wait(60) == 0, group.whole_log()[-6000:]
        return runs


def run_script(name: str, *words: str, minutes: float) -> subprocess.CompletedProcess[str]:
    """One of the project's scripts that start servers, as its user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *words],
        cwd=ROOT,
        env={**environment_at_start(), **OF_SERVERS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * minutes,
    )


# ---- prompts and texts ----------------------------------------------------------------------------------------------


@cache
def prompts() -> tuple[str, ...]:
    """The held-out prompts of the pair."""
    return tuple(json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines())


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TARGET / "tokenizer.json"))


def tokenize(text: str) -> list[int]:
    return _tokenizer().encode(text, add_special_tokens=False).ids


@cache
def prompt_tokens() -> tuple[int, ...]:
    """All held-out prompts in one row of tokens, to cut prompts of any length from."""
    return tuple(token for prompt in prompts() for token in tokenize(prompt))


def text_of(start: int, length: int) -> list[int]:
    return list(prompt_tokens()[start : start + length])


def assert_same_texts(found: Scenario, plain: Scenario) -> None:
    """Token ids, row by row; where they differ, how near the target's decision was."""
    assert len(found.results) == len(plain.results)
    complaints = []
    for row, (ours, theirs) in enumerate(zip(found.results, plain.results, strict=True)):
        for ours_one, theirs_one in zip(ours["outputs"], theirs["outputs"], strict=True):
            complaints += compare(f"row {row}", ours_one, theirs_one)
    assert not complaints, "\n".join(complaints)


def compare(name: str, ours: Json, theirs: Json) -> list[str]:
    a, b = ours["token_ids"], theirs["token_ids"]
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        known = theirs.get("gaps")
        gap = f", the target's two likeliest were {known[at]:.2e} apart" if known and at < len(known) else ""
        return [f"{name}: differs from token {at} on ({a[at : at + 4]} for {b[at : at + 4]}{gap})"]
    ends = [(one["text"], one["finish_reason"], one["stop_reason"]) for one in (ours, theirs)]
    return [] if ends[0] == ends[1] else [f"{name}: same tokens, but {ends[0]!r} for {ends[1]!r}"]


# ---- processes ------------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
