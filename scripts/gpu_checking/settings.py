"""What one check runs: the pair, the engines and the orders that each of them gets; for a GPU, and small for a CPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu_checking.shapes import PAIRS
from scripts.gpu_checking.texts import SURPRISE
from scripts.gpu_checking.widened import LOAD_FORMAT
from scripts.repository import ROOT

PROCESS = "saguaro_process"
"""Saguaro whose draft is a process on a GPU of its own: only where there are two. Plain "saguaro" is a stream."""

MODES = ("plain", "saguaro", "draft_model", PROCESS)
"""In the order in which they run: the last is the first to be left out where time runs short."""

GOAL_PAIR = "32b/0.6b"
"""The pair that the goals of speed at batch 1 are about."""

PROMPTS = ROOT / "assets" / "pair" / "prompts.jsonl"
PROMPT_TOKENS = 96


class SettingsError(ValueError):
    """The options do not make a check; the message is one line that says why."""


@dataclass(frozen=True)
class Settings:
    """All options of one check. `engine` goes to `LLM` as it is, `speculation` into Saguaro's configuration.

    `also`: pairs of which only the speed is measured, at the smallest and the largest batch, in the time that is left.
    `gpus`: how many are visible. `speed_prompts`: a speed is taken from at least so many texts. `tie` [nats]: how close
    two tokens may be for rounding to choose between them. `budget` [s]: of the whole run.
    """

    pair: str = "8b/1b"
    also: tuple[str, ...] = (GOAL_PAIR,)
    on_cpu: bool = False
    gpus: int = 1
    modes: tuple[str, ...] = MODES[:3]
    batches: tuple[int, ...] = (1, 4, 16, 64)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    k: int = 4
    tokens: int = 128
    speed_prompts: int = 4
    texts: int = 32
    samples: int = 1024
    sample_tokens: int = 6
    kernel_seeds: int = 4
    dtype: str = "bfloat16"
    tie: float = 0.3
    budget: float = 520.0
    engine: dict[str, Any] = field(default_factory=dict)
    speculation: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu" if self.on_cpu else "cuda"

    @property
    def few_batches(self) -> tuple[int, ...]:
        """The smallest and the largest."""
        return tuple(sorted({min(self.batches), max(self.batches)}))

    @property
    def modes_also(self) -> tuple[str, ...]:
        """The engines of the pairs in `also`."""
        return tuple(mode for mode in self.modes if mode != PROCESS)

    def check(self) -> None:
        """Complain about what would fail later, after minutes."""
        for pair in (self.pair, *self.also):
            if pair not in PAIRS:
                raise SettingsError(f"there is no pair {pair!r}: write one of {', '.join(PAIRS)}")
        if len({self.pair, *self.also}) <= len(self.also):
            raise SettingsError(f"no pair is measured twice: {', '.join((self.pair, *self.also))}")
        for mode in self.modes:
            if mode not in MODES:
                raise SettingsError(f"there is no engine {mode!r}: write one of {', '.join(MODES)}")
        if "plain" not in self.modes:
            raise SettingsError("the others are compared with plain vLLM: write plain among the engines")
        if not self.batches or min(self.batches) < 1:
            raise SettingsError("a batch has at least one request")
        if self.k < 1:
            raise SettingsError(f"num_speculative_tokens must be at least 1, not {self.k}")
        available = len(self.prompts())
        if max(map(self._speed_prompts, self.batches)) > available or self.texts > available:
            raise SettingsError(f"there are {available} prompts: no batch can be larger")

    def prompts(self) -> list[str]:
        """The committed prompts."""
        lines = PROMPTS.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    def load_order(self, mode: str, target: Path, draft: Path, pair: str | None = None) -> dict[str, Any]:
        """The first line for an engine; `pair` is that of the two folders, `self.pair` where it is left out."""
        most, shapes = max(self.batches), PAIRS[pair or self.pair]
        llm: dict[str, Any] = {
            "model": str(target),
            "load_format": LOAD_FORMAT,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": max(256, PROMPT_TOKENS + self.tokens + 2 * self.k + 8),
            "max_num_seqs": most,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if self.on_cpu:
            llm |= {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 512}
        else:
            # Without inductor an engine starts in seconds; the graphs are there, and vLLM's fused operations
            llm |= {
                "gpu_memory_utilization": shapes.memory,
                "max_num_batched_tokens": 4096,
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": self._capture_sizes(mode),
                },
            }
        llm |= self.engine
        if mode != "plain":
            speculation: dict[str, Any] = {
                "method": "saguaro" if mode == PROCESS else mode,
                "model": str(draft),
                "num_speculative_tokens": self.k,
            }
            if mode == "draft_model":
                speculation["draft_sample_method"] = "probabilistic"  # ours has a default of its own
            if mode == "saguaro":
                memory = {} if shapes.draft_gpu_memory is None else {"draft_gpu_memory": shapes.draft_gpu_memory}
                speculation |= {"placement": "stream", **memory, **self.speculation}
            if mode == PROCESS:
                others = {name: value for name, value in self.speculation.items() if name != "draft_gpu_memory"}
                speculation |= {**others, "placement": "process"}
            llm["speculative_config"] = speculation
        return {
            "llm": llm,
            "prompts": self.prompts(),
            "prompt_tokens": PROMPT_TOKENS,
            "interpreted": self.on_cpu,
        }

    def _capture_sizes(self, mode: str) -> list[int]:
        """Tokens of a decode step with 1, 2, 4, ... and all requests."""
        each = 1 if mode == "plain" else self.k + 1
        rows = {1 << i for i in range(max(self.batches).bit_length())} | set(self.batches)
        return sorted(each * row for row in rows if row <= max(self.batches))

    def orders(self, mode: str, folder: Path) -> list[dict[str, Any]]:
        """What an engine is asked, the most telling first. Not here on a CPU: what only a GPU can show."""
        orders: list[dict[str, Any]] = [
            {"order": "texts", "prompts": self.texts, "tokens": self.tokens, "gaps": mode == "plain"},
            *self._speeds(self.batches),
        ]
        if mode in ("saguaro", PROCESS):
            batch = min(4, max(self.batches))
            short = min(16, self.tokens)
            orders.append({"order": "no_sync", "batch": batch, "tokens": short})
            orders += self._hits()
        if mode == "saguaro":
            if not self.on_cpu:
                orders.append({"order": "graphs"})
            orders.append({"order": "memory", "batch": max(self.batches), "tokens": short})
            if not self.on_cpu:
                trace = str(folder / "timeline.json.gz")
                orders.append({"order": "timeline", "batch": batch, "tokens": short, "trace": trace})
        if mode != "draft_model" and 1.0 in self.temperatures:
            count, tokens = self.samples, self.sample_tokens
            orders.append({"order": "samples", "count": count, "batch": max(self.batches), "tokens": tokens})
        return orders

    def orders_also(self, mode: str) -> list[dict[str, Any]]:
        """What an engine of a pair in `also` is asked."""
        return [*self._speeds(self.few_batches), *(self._hits() if mode == "saguaro" else [])]

    def _speeds(self, batches: tuple[int, ...]) -> list[dict[str, Any]]:
        """Speeds at every batch and temperature, on a GPU after a warm-up of each batch."""

        def order(batch: int, temperature: float, prompts: int, tokens: int) -> dict[str, Any]:
            named = {"batch": batch, "temperature": temperature, "prompts": prompts, "tokens": tokens}
            return {"order": "speed", **named}

        warm = [] if self.on_cpu else [order(batch, 0.0, batch, 8) | {"warm_up": True} for batch in batches]
        return warm + [
            order(batch, t, self._speed_prompts(batch), self.tokens) for t in self.temperatures for batch in batches
        ]

    def _speed_prompts(self, batch: int) -> int:
        """As many whole batches as it takes."""
        return batch * math.ceil(self.speed_prompts / batch)

    def _hits(self) -> list[dict[str, Any]]:
        return [{"order": "hit", "batch": batch, "tokens": 24 if self.on_cpu else 64} for batch in self.few_batches]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("pair", "also", "device", "gpus", "modes", "batches", "few_batches", "temperatures", "k", "tokens")
        more = ("speed_prompts", "texts", "samples", "sample_tokens", "kernel_seeds", "dtype", "tie", "budget")
        return {name: getattr(self, name) for name in (*names, *more, "engine", "speculation")} | {"surprise": SURPRISE}


def on_cpu() -> dict[str, Any]:
    """What is different where the check itself is tested: everything small, and nothing that needs a GPU."""
    return {
        "pair": "small",
        "also": ("deeper",),
        "on_cpu": True,
        "gpus": 0,
        "modes": MODES,
        "batches": (1, 2),
        "tokens": 12,
        "speed_prompts": 1,
        "texts": 4,
        "samples": 16,
        "sample_tokens": 3,
        "kernel_seeds": 1,
        "dtype": "float32",
        "tie": 0.001,
        "budget": 1500.0,
    }
