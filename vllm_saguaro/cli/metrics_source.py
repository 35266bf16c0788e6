"""The metrics of a running server: where they are, and reading them."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import Final
from urllib.parse import urlsplit

from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.usage import UsageError

_TIMEOUT: Final = 10.0


class NoAnswer(Exception):
    """The server cannot be read; one line."""


def metrics_url(url: str) -> str:
    """The address of the metrics of a server. Raises UsageError for what is none."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        good = False
    if not good:
        raise UsageError(f"watch: {url!r} is no address of a server: write one like http://localhost:8000")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/metrics") else f"{path}/metrics").geturl()


def fetch(url: str) -> Snapshot:
    """Read the metrics. Raises NoAnswer."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return Snapshot(answer.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"{url} answers {error.code} {error.reason}: is that a vLLM server?") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        said = " ".join(str(getattr(error, "reason", error)).split())[:200]  # it may hold what was sent, line ends too
        raise NoAnswer(f"{url} does not answer ({said or type(error).__name__}): does the server run?") from error
