"""What to ask which servers: the options of a benchmark of servers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_saguaro.benchmark.checkout import PAIR
from vllm_saguaro.benchmark.prompts import read_prompts
from vllm_saguaro.benchmark.served.records import Load
from vllm_saguaro.benchmark.settings import SettingsError, relative


@dataclass(frozen=True)
class Settings:
    """All options. `servers`: name and address of each, the first is the one that others are compared with.

    `model`: the name that requests ask for (default: the one that the server serves). `chat`: each
    prompt is a user's message, put into the model's chat template. `prefix_cache`: prompts that come again may be found
    in the server's prefix cache; else each repetition is salted.
    """

    servers: tuple[tuple[str, str], ...]
    dataset: str = "prompts"
    dataset_path: Path = PAIR.parent / "prompts.jsonl"
    category: str | None = None
    model: str | None = None
    concurrency: tuple[int, ...] = (1,)
    temperature: tuple[float, ...] = (0.0,)
    prompts: int = 24
    tokens: int = 96
    repetitions: int = 3
    chat: bool = False
    prefix_cache: bool = False
    timeout: float = 300.0

    def loads(self) -> list[Load]:
        """Every number of requests at every temperature."""
        return [Load(*each) for each in itertools.product(self.concurrency, self.temperature)]

    def read_prompts(self) -> list[str]:
        """The prompts that are asked. Raises SettingsError where there are too few, and what `read_prompts` raises."""
        found = read_prompts(self.dataset_path, self.dataset, self.category)
        if len(found) < self.prompts:
            of = "" if self.category is None else f" of {self.category}"
            raise SettingsError(f"--prompts {self.prompts}: {self.dataset_path} holds {len(found)}{of}: write fewer")
        return found[: self.prompts]

    def check(self) -> None:
        """Complain before anything is sent."""
        if not self.dataset_path.is_file():
            raise SettingsError(f"{self.dataset_path} does not exist: name the prompts with --dataset-path")
        positive = {
            "--prompts": self.prompts,
            "--tokens": self.tokens,
            "--repetitions": self.repetitions,
            "--concurrency": min(self.concurrency),
        }
        for name, value in positive.items():
            if value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}")
        if not min(self.temperature) >= 0:
            raise SettingsError(f"--temperature must be at least 0, not {min(self.temperature):g}")
        if not self.timeout > 0:
            raise SettingsError(f"--timeout must be more than 0 seconds, not {self.timeout:g}")
        if max(self.concurrency) > self.prompts:
            raise SettingsError(
                f"--concurrency {max(self.concurrency)} with --prompts {self.prompts}: so many are never under way; "
                "write more --prompts"
            )
        names = [name for name, _ in self.servers]
        for name in names:
            if names.count(name) > 1:
                raise SettingsError(f'two servers are called "{name}": name them as A=URL B=URL')
        self.read_prompts()

    def without_secrets(self, words: Iterable[str]) -> list[str]:
        """The words of a command without users' names and passwords in the servers' addresses."""
        found = list(words)
        secrets = {urlsplit(url).netloc.rpartition("@")[0] for _, url in self.servers} - {""}
        for secret in sorted(secrets, key=len, reverse=True):  # one may be the end of another
            found = [word.replace(f"{secret}@", "") for word in found]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, paths without the part that belongs to this machine."""
        return dataclasses.asdict(self) | {
            "servers": {name: _without_secrets(url) for name, url in self.servers},
            "dataset_path": relative(self.dataset_path),
            "concurrency": list(self.concurrency),
            "temperature": list(self.temperature),
        }


def server(text: str) -> tuple[str, str]:
    """`NAME=URL` or `URL`: name and address; the name is otherwise host and port. Raises ValueError."""
    name, equals, url = text.partition("=")
    if not equals or "/" in name or ":" in name:
        name, url = "", text
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
        parts = parts._replace(netloc="")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server: write one like http://localhost:8000")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has more than an address: write one like http://localhost:8000")
    place = parts.hostname if port is None else f"{parts.hostname}:{port}"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return name or place, parts._replace(path=path).geturl()


def _without_secrets(url: str) -> str:
    """The address without a user's name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
