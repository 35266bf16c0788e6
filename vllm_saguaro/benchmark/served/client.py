"""Asks a server: what it is, what it counted, and one text at a time as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_saguaro.benchmark import counters
from vllm_saguaro.benchmark.counters import GENERATED, HITS, count
from vllm_saguaro.benchmark.served.records import Answer

_ABOUT_SECONDS = 10.0
"""How long a server may take to say what it is."""
_LINE_BYTES = 1 << 20


class ServerError(RuntimeError):
    """A server does not answer as one of vLLM's; one line that names it."""


@dataclass(frozen=True)
class About:
    """What a server says of itself. `longest` is None where it does not say how long its texts may be."""

    name: str
    url: str
    model: str
    root: str
    longest: int | None
    version: str | None
    has_counters: bool
    is_saguaro: bool


def open_session() -> aiohttp.ClientSession:
    """Connections that are kept, and no limit to their number."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=_LINE_BYTES)


async def about(session: aiohttp.ClientSession, name: str, url: str, model: str | None) -> About:
    """Look at a server before it is asked for texts.

    Raises ServerError where nothing answers, where it does not serve `model`, or several and none is named.
    """
    listed = await _get(session, name, f"{url}/v1/models")
    try:
        cards = {str(card["id"]): card for card in json.loads(listed)["data"]}
    except (ValueError, KeyError, TypeError):
        raise ServerError(f"{name}: {url}/v1/models is no list of models: is it an OpenAI server?") from None
    known = ", ".join(cards)
    if model is None and len(cards) != 1:
        raise ServerError(f"{name} serves {known or 'nothing'}: name one with --model")
    chosen = next(iter(cards)) if model is None else model
    if chosen not in cards:
        raise ServerError(f"{name} serves {known}, not {chosen}: name one that all servers serve with --model")
    card = cards[chosen]
    try:
        counted = await counted_by(session, name, url)
    except ServerError:
        counted = {}
    try:
        version = json.loads(await _get(session, name, f"{url}/version")).get("version")
    except (ServerError, ValueError, AttributeError):
        version = None
    longest = card.get("max_model_len")
    return About(
        name,
        url,
        chosen,
        str(card.get("root") or chosen),
        int(longest) if longest else None,
        version,
        bool(counted),
        HITS in counted,
    )


async def counted_by(session: aiohttp.ClientSession, name: str, url: str) -> dict[str, float]:
    """The server's counters, as `counters.flatten` has those of an engine. Raises ServerError where it does not say."""
    return counters.from_exposition(await _get(session, name, f"{url}/metrics"))


def others_tokens(counted: dict[str, float], ours: int) -> int:
    """How many tokens a server made that we did not ask for."""
    return max(0, round(count(counted, GENERATED)) - ours) if GENERATED in counted else 0


async def ask(session: aiohttp.ClientSession, server: About, body: dict[str, Any], seconds: float) -> Answer:
    """One streamed completion, of a chat where the body has messages.

    Raises ServerError unless it comes to its end within so many seconds.
    """
    door = "chat/completions" if "messages" in body else "completions"
    stream = _Stream(time.perf_counter())
    try:
        async with (
            asyncio.timeout(seconds),
            session.post(f"{server.url}/v1/{door}", json=body, timeout=aiohttp.ClientTimeout(total=None)) as response,
        ):
            if response.status != 200:
                raise ServerError(f"{server.name} answers {response.status}: {_said(await response.text())}")
            async for raw in response.content:
                if stream.take(raw.decode("utf-8", "replace").strip()):
                    break
    except TimeoutError:
        raise ServerError(f"{server.name}: no end of a text after {seconds:g} s (--timeout)") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(f"{server.name} broke off ({type(error).__name__}: {error})") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ServerError(f"{server.name}: this is no stream of completions ({error})") from error
    return stream.answer(server.name)


class _Stream:
    """The pieces of one answer, with the times at which they came."""

    def __init__(self, begin: float) -> None:
        self._begin = begin
        self._texts: list[str] = []
        self._tokens: list[int] | None = []
        self._times: list[float] = []
        self._usage: int | None = None
        self._ended = False

    def take(self, line: str) -> bool:
        """One line of the stream; whether it was the last."""
        if not line.startswith("data: "):
            return False
        if line == "data: [DONE]":
            self._ended = True
            return True
        data = json.loads(line.removeprefix("data: "))
        if "error" in data:
            raise ValueError(f"an error in the stream: {_said(json.dumps(data))}")
        if data.get("usage"):
            self._usage = int(data["usage"]["completion_tokens"])
        for choice in data["choices"]:
            ids, text = choice.get("token_ids"), _text(choice)
            if not text and not ids:
                continue  # the end alone, which says only why
            self._times.append(time.perf_counter())
            self._texts.append(text)
            if ids is None:
                self._tokens = None
            elif self._tokens is not None:
                self._tokens.extend(ids)
        return False

    def answer(self, name: str) -> Answer:
        """All of it, once it has ended."""
        if not self._ended or not self._times:
            what = "a text ended without its last line" if self._times else "no text came"
            raise ServerError(f"{name}: {what}: look into the log of that server, or of a proxy before it")
        tokens = None if self._tokens is None else tuple(self._tokens)
        count = self._usage if self._usage is not None else len(tokens if tokens is not None else self._times)
        gaps = tuple(after - before for before, after in zip(self._times, self._times[1:], strict=False))
        first, last = self._times[0] - self._begin, self._times[-1] - self._begin
        return Answer("".join(self._texts), count, first, last, gaps, tokens)


def _text(choice: dict[str, Any]) -> str:
    """The text of a piece: of a completion, or of a chat, thoughts included."""
    if "text" in choice:
        return str(choice["text"])
    delta = choice["delta"]
    return "".join(str(delta.get(name) or "") for name in ("reasoning", "reasoning_content", "content"))


async def _get(session: aiohttp.ClientSession, name: str, url: str) -> str:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=_ABOUT_SECONDS)) as response:
            text = await response.text()
            if response.status != 200:
                raise ServerError(f"{name}: {url} answers {response.status}: {_said(text)}")
            return text
    except TimeoutError:
        raise ServerError(f"{name}: {url} does not answer within {_ABOUT_SECONDS:.0f} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(f"{name}: {url} does not answer ({error}): does the server run?") from None


def _said(text: str) -> str:
    """The message of an error as vLLM writes it, or the beginning of what came."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]
