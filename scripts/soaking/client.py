"""Asks the server one thing, and finds out what became of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from scripts.soaking.answers import Answer, Choice, Fate, digest
from scripts.soaking.structures import departure
from scripts.soaking.traffic import Asked

ANSWER_SECONDS = 300.0
"""An answer that takes longer is lost."""
_LINE_BYTES = 1 << 20

Pieces = Callable[[float, float], None]
"""Told of each piece of a stream after its first: when the one before came, and when this one did."""


class _BrokenError(Exception):
    """The answer is not one; the message says why."""


class _RefusedError(Exception):
    """The server says no in a stream that it has begun; the message has its words."""


class _Texts:
    """The texts of one answer, as far as they have come."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str | None] = {}
        self.stop: dict[int, str | int | None] = {}

    def add(self, choice: dict[str, Any]) -> None:
        at = choice["index"]
        if self.finish.get(at) is not None:
            raise _BrokenError(f"text {at} went on after its end")
        self.texts[at] = self.texts.get(at, "") + choice["text"]
        self.tokens.setdefault(at, []).extend(choice["token_ids"] or ())
        self.finish[at], self.stop[at] = choice["finish_reason"], choice.get("stop_reason")

    def choices(self) -> tuple[Choice, ...]:
        """Up to the last text that has come; one before it that has not begun is empty."""
        return tuple(
            Choice(
                digest(self.texts.get(at, "")), tuple(self.tokens.get(at, ())), self.finish.get(at), self.stop.get(at)
            )
            for at in range(max(self.texts, default=-1) + 1)
        )


def open_session() -> aiohttp.ClientSession:
    """A connection for every request, and no limit to their number: who closes one closes that request alone."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, read_bufsize=_LINE_BYTES)


async def ask(session: aiohttp.ClientSession, url: str, asked: Asked, pieces: Pieces | None = None) -> Answer:
    """Ask, and wait for the end of the answer or for the moment at which we close the connection."""
    begin = time.monotonic()
    texts = _Texts()
    fate, reason = Fate.LOST, ""
    try:
        async with asyncio.timeout(ANSWER_SECONDS if asked.hold is None else asked.hold):
            fate, reason = await _exchange(session, url, asked, texts, pieces)
    except TimeoutError:
        if asked.hold is None:
            reason = f"no end after {ANSWER_SECONDS:.0f} s"
        else:
            fate, reason = Fate.CLOSED, "given up by us"
    except _RefusedError as error:
        fate, reason = Fate.REFUSED, str(error)
    except _BrokenError as error:
        reason = str(error)
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    complaint = _complaint(asked, texts) if fate == Fate.FINISHED else ""
    return Answer(asked.index, fate, reason, texts.choices(), complaint, time.monotonic() - begin)


async def likeliest(session: aiohttp.ClientSession, url: str, asked: Asked) -> list[list[dict[str, float]]]:
    """Log-probabilities of the likeliest tokens of each text and token; nothing where the server does not tell."""
    body = asked.body | {"return_tokens_as_token_ids": True}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            choices = (await response.json())["choices"]
            return [[dict(each) for each in choice["logprobs"]["top_logprobs"]] for choice in choices]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        return []


async def _exchange(
    session: aiohttp.ClientSession, url: str, asked: Asked, texts: _Texts, pieces: Pieces | None
) -> tuple[Fate, str]:
    name = f"soak-{asked.index}"
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.post(
        f"{url}/v1/completions", json=asked.body, headers={"X-Request-Id": name}, timeout=timeout
    ) as response:
        if 400 <= response.status < 500:
            message = (await response.json())["error"]["message"]
            return Fate.REFUSED, f"{response.status}: {message}"
        if response.status != 200:
            raise _BrokenError(f"status {response.status}: {(await response.text())[:200]}")
        if asked.body.get("stream"):
            closed = await _read_stream(response, asked, texts, f"cmpl-{name}", pieces)
            if closed:
                response.close()
                return Fate.CLOSED, "closed by us"
        else:
            data = await response.json()
            _check_name(data, f"cmpl-{name}")
            for choice in data["choices"]:
                texts.add(choice)
    _check_end(asked, texts)
    return Fate.FINISHED, ""


async def _read_stream(
    response: aiohttp.ClientResponse, asked: Asked, texts: _Texts, name: str, pieces: Pieces | None
) -> bool:
    """Read to the end; True if the moment to close came first."""
    count = 0
    last: dict[int, float] = {}
    if asked.close_after == 0:
        return True
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return False
        data = json.loads(line.removeprefix("data: "))
        if "error" in data and not texts.texts and 400 <= data["error"]["code"] < 500:
            raise _RefusedError(f"{data['error']['code']}: {data['error']['message']}")
        _check_name(data, name)
        now = time.monotonic()
        for choice in data["choices"]:
            texts.add(choice)
            if pieces is not None and choice["index"] in last:
                pieces(last[choice["index"]], now)
            last[choice["index"]] = now
        count += 1
        if count == asked.close_after:
            return True
    raise _BrokenError("the stream ended without its last line")


def _check_name(data: dict[str, Any], name: str) -> None:
    if "error" in data:
        raise _BrokenError(f"an error instead of text: {json.dumps(data['error'])[:200]}")
    if data["id"] != name:
        raise _BrokenError(f"the answer of {data['id']} came for {name}")


def _check_end(asked: Asked, texts: _Texts) -> None:
    if sorted(texts.texts) != list(range(asked.outputs)):
        raise _BrokenError(f"texts {sorted(texts.texts)} of {asked.outputs}")
    for at, finish in texts.finish.items():
        if finish not in ("stop", "length"):
            raise _BrokenError(f"text {at} ended with finish_reason {finish!r}")


def _complaint(asked: Asked, texts: _Texts) -> str:
    """What is wrong with an answer that came to its end, whatever plain vLLM says."""
    most = asked.body["max_tokens"]
    for at, text in texts.texts.items():
        count = len(texts.tokens[at])
        if count > most or (texts.finish[at] == "length" and count != most):
            return f"text {at} has {count} tokens of {most} and ended with {texts.finish[at]!r}"
        if asked.structure is not None and texts.finish[at] == "stop":
            wrong = departure(asked.structure, text)
            if wrong:
                return f"text {at}: {wrong}"
    return ""
