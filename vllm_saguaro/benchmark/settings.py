"""What to measure: the options of a benchmark, the engines and workloads that follow, and what each engine is given."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_saguaro.benchmark.checkout import PAIR, in_checkout
from vllm_saguaro.benchmark.prompts import read_prompts
from vllm_saguaro.benchmark.records import MODES, Engine, Workload

MAX_MODEL_LENGTH = 1024
KV_CACHE_BYTES = 512 << 20

_OPTION_OF = {
    "num_speculative_tokens": "--k",
    "branches": "--branches",
    "fan_out": "--fan-out",
    "draft_sample_method": "--sampling",
}
"""Keys of the speculative config that an engine has fields for."""


class SettingsError(ValueError):
    """The options do not make a benchmark; the message is one line that says why."""


@dataclass(frozen=True)
class Settings:
    """All options of one benchmark. `draft` and `prompt_file` are found beside the target unless given.

    `sweep`: keys of saguaro's speculative config, each with the values to make engines of.
    """

    target: Path = PAIR
    draft: Path | None = None
    prompt_file: Path | None = None
    dataset: str = "prompts"
    category: str | None = None
    modes: tuple[str, ...] = MODES
    batch: tuple[int, ...] = (1,)
    temperature: tuple[float, ...] = (0.0,)
    top_p: tuple[float, ...] = (1.0,)
    k: tuple[int, ...] = (4,)
    branches: tuple[int | str, ...] = ("auto",)
    fan_out: tuple[str, ...] = ("ranked",)
    sampling: tuple[str, ...] = ("coupled",)
    baseline_sampling: tuple[str, ...] = ("greedy",)
    options: dict[str, Any] = field(default_factory=dict)
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    forecasts: bool = False
    prompts: int = 24
    tokens: int = 96
    repetitions: int = 3
    target_layers: int | None = None
    draft_layers: int | None = None
    dtype: str = "float32"
    eager: bool = False
    core_target: tuple[int, ...] = ()
    core_draft: tuple[int, ...] = ()

    @property
    def draft_path(self) -> Path:
        """The draft's folder."""
        return self.draft or self.target / "draft"

    @property
    def prompt_path(self) -> Path:
        """The file of prompts."""
        return self.prompt_file or self.target.parent / "prompts.jsonl"

    @property
    def target_cores(self) -> tuple[int, ...]:
        """Cores of the target, and of the draft too where both take turns: the first allowed one unless given."""
        return self.core_target or allowed_cores()[:1]

    @property
    def draft_cores(self) -> tuple[int, ...]:
        """Cores of saguaro's draft: the first allowed one that is not the target's, or the target's."""
        others = tuple(core for core in allowed_cores() if core not in self.target_cores)
        return self.core_draft or others[:1] or self.target_cores

    @property
    def cores(self) -> tuple[int, ...]:
        """All cores that the benchmark computes on."""
        with_draft = self.draft_cores if "saguaro" in self.modes else ()
        return tuple(sorted({*self.target_cores, *with_draft}))

    def engines(self) -> list[Engine]:
        """In the order in which they take turns: plain first, the others' texts are compared with its own."""
        found: list[Engine] = []
        for mode in (mode for mode in MODES if mode in self.modes):
            if mode == "plain":
                found.append(Engine("plain"))
            elif mode == "draft_model":
                found += [Engine("draft_model", k, sampling=way) for k in self.k for way in self.baseline_sampling]
            else:
                found += [
                    Engine("saguaro", k, branches, fan_out, sampling, options)
                    for k in self.k
                    for branches in self.branches
                    for fan_out in self.fan_out
                    for sampling in self.sampling
                    for options in itertools.product(
                        *([(key, value) for value in values] for key, values in self.sweep)
                    )
                ]
        return found

    def workloads(self) -> list[Workload]:
        """Every batch at every temperature and top-p."""
        return [Workload(*each) for each in itertools.product(self.batch, self.temperature, self.top_p)]

    def check(self) -> None:
        """Complain about what would fail later, after minutes."""
        for path in (self.target / "config.json", self.draft_path / "config.json", self.prompt_path):
            if not path.is_file():
                raise SettingsError(f"{path} does not exist: name the pair with --target, --draft and --prompt-file")
        positive = {"--prompts": self.prompts, "--tokens": self.tokens, "--repetitions": self.repetitions}
        for name, value in positive.items():
            if value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}")
        for top_p in self.top_p:
            if not 0 < top_p <= 1:
                raise SettingsError(f"--top-p must be above 0 and at most 1, not {top_p:g}")
        self._check_sweep()
        self._check_forecasts()
        if self.tokens + max(self.k) + 2 > MAX_MODEL_LENGTH:
            raise SettingsError(f"--tokens {self.tokens} does not fit into {MAX_MODEL_LENGTH} positions: write fewer")
        available = len(self.read_prompts())
        if self.prompts > available:
            raise SettingsError(f"--prompts {self.prompts}: {self.prompt_path} holds {available}: write fewer")
        count = os.cpu_count() or 1
        beyond = set(self.cores) - set(range(count))
        if beyond:
            raise SettingsError(
                f"there is no processor core {min(beyond)} on this machine: write cores from 0 to {count - 1}"
            )

    def _check_sweep(self) -> None:
        keys = [key for key, _ in self.sweep]
        for key in keys:
            if key in _OPTION_OF:
                raise SettingsError(f"--sweep {key}: write {_OPTION_OF[key]} with all the values instead")
            if key in self.options:
                raise SettingsError(f"{key} is given with --option and with --sweep: leave one of them out")
            if keys.count(key) > 1:
                raise SettingsError(f"--sweep {key} is given twice: write all the values in one, as {key}=A,B")

    def _check_forecasts(self) -> None:
        if not self.forecasts:
            return
        engines = [engine for engine in self.engines() if engine.mode == "saguaro"]
        if not engines:
            raise SettingsError("--forecasts watches saguaro's draft side: add saguaro to --modes")
        if any(self._saguaro_options(engine).get("placement") != "inline" for engine in engines):
            raise SettingsError(
                "--forecasts needs the draft side in the worker's own process: add --option placement=inline"
            )

    def _saguaro_options(self, engine: Engine) -> dict[str, Any]:
        """Keys of saguaro's configuration that are given by name, the engine's own last."""
        return self.options | dict(engine.options)

    def read_prompts(self) -> list[str]:
        """All prompts of the file, or of the category."""
        return read_prompts(self.prompt_path, self.dataset, self.category)

    def order(self, engine: Engine, target: Path, draft: Path) -> dict[str, Any]:
        """What the worker of `engine` is told first; `target` and `draft` are the folders to load, deepened or not.

        The plugin divides the cores between saguaro's target and draft itself, so its worker gets both parts and no
        number of threads; the other modes compute on the target's cores alone.
        """
        is_saguaro = engine.mode == "saguaro"
        return {
            "cores": list(self.cores if is_saguaro else self.target_cores),
            "threads": None if is_saguaro else len(self.target_cores),
            "llm": self._llm_arguments(engine, target, draft),
            "prompts": self.read_prompts()[: self.prompts],
            "prompt_tokens": MAX_MODEL_LENGTH - self.tokens - max(self.k) - 1,
            "forecasts": self.forecasts and is_saguaro,
        }

    def _llm_arguments(self, engine: Engine, target: Path, draft: Path) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(target),
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": MAX_MODEL_LENGTH,
            "max_num_seqs": max(self.batch),
            "max_num_batched_tokens": max(2048, MAX_MODEL_LENGTH),
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "enable_prefix_caching": False,  # every repetition has the same prompts
            "enforce_eager": self.eager,
            "disable_log_stats": False,  # or there are no metrics
        }
        if engine.mode != "plain":
            arguments["speculative_config"] = {
                "method": engine.mode,
                "model": str(draft),
                "num_speculative_tokens": engine.k,
                "draft_sample_method": engine.sampling,
            }
        if engine.mode == "saguaro":
            arguments["speculative_config"] |= {
                "branches": engine.branches,
                "fan_out": engine.fan_out,
                "draft_cpus": ",".join(map(str, self.draft_cores)),
                **self._saguaro_options(engine),
            }
        return arguments

    def to_json(self) -> dict[str, Any]:
        """Plain values, paths without the part that belongs to this machine."""
        return dict(self._plain_values())

    def _plain_values(self) -> Iterator[tuple[str, Any]]:
        values = dataclasses.asdict(self) | {
            "draft": self.draft_path,
            "prompt_file": self.prompt_path,
            "core_target": self.target_cores,
            "core_draft": self.draft_cores,
            "sweep": {key: list(values) for key, values in self.sweep},
        }
        for name, value in values.items():
            if isinstance(value, Path):
                yield name, relative(value)
            else:
                yield name, list(value) if isinstance(value, tuple) else value


def relative(path: Path) -> str:
    """A path inside the project as the project names it; another one by its last two parts."""
    return in_checkout(path) or "/".join(("...", *path.resolve().parts[-2:]))


def allowed_cores() -> tuple[int, ...]:
    """The cores this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))
