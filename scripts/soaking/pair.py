"""What `soak.py` and `faults.py` are told alike: which pair is served, and with which options of saguaro."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.repository import ROOT
from vllm_saguaro.benchmark.options import key_value
from vllm_saguaro.benchmark.settings import SettingsError, relative
from vllm_saguaro.config import OWN_KEYS, VLLM_KEYS

MODEL_NAME = "pair"
MAX_MODEL_LENGTH = 512
MAX_RUNNING = 16
KV_CACHE_BYTES = 32 << 20
"""About 2,600 tokens of the committed pair: too few for all that may run at once, so requests are preempted."""


@dataclass(frozen=True)
class PairSettings:
    """The pair, its prompts, and further keys of the speculative config."""

    target: Path = ROOT / "assets" / "pair" / "target"
    prompt_file: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_path(self) -> Path:
        """The file of prompts."""
        return self.prompt_file or self.target.parent / "prompts.jsonl"

    def check_pair(self) -> None:
        """Complain about files that are not there and keys that saguaro has not. Raises `SettingsError`."""
        for path in (self.target / "config.json", self.target / "tokenizer.json", self.prompt_path):
            if not path.is_file():
                raise SettingsError(f"{path} does not exist: name the pair with --target and --prompt-file")
        for key in self.options:
            if key not in (*OWN_KEYS, *VLLM_KEYS):
                raise SettingsError(f"--option {key}: saguaro has no such key, see docs/options.md")

    def serve_command(self, port: int, kv_cache_bytes: int) -> list[str]:
        """The part of `vllm serve`'s command line that every server of the pair has."""
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.target)]
        command += ["--served-model-name", MODEL_NAME, "--dtype", "float32", "--enforce-eager", "--seed", "0"]
        command += ["--max-model-len", str(MAX_MODEL_LENGTH), "--max-num-seqs", str(MAX_RUNNING)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        return [*command, "--kv-cache-memory-bytes", str(kv_cache_bytes)]


PLAIN_WORDS = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(4 * MAX_MODEL_LENGTH))
"""A plain server reads every prompt in one piece: a seeded request whose prompt comes in pieces ends plain vLLM 0.32 on
a CPU (docs/exactness.md)."""


def add_pair_options(parser: argparse.ArgumentParser, defaults: PairSettings) -> None:
    """The options of the command line that `PairSettings` holds."""
    parser.add_argument(
        "--option",
        action="append",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="another key of saguaro's speculative config; repeatable",
    )
    parser.add_argument("--target", type=Path, default=defaults.target, help=f"(default: {relative(defaults.target)})")
    parser.add_argument("--prompt-file", type=Path, help="(default: prompts.jsonl beside the target)")
