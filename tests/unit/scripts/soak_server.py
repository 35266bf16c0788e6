"""A server that answers like vLLM's, within this process, and can be told to go wrong with single requests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from scripts.soaking import processes

Json = dict[str, Any]

FLAWS = ("error", "broken", "no end", "error event", "no event", "another's", "no reason", "short", "wrong token",
         "refused", "served", "wrong form", "late")  # fmt: skip


class SoakServer:
    """Texts are a function of the request (and, without a seed, of chance). `flaws`: by request index, one of `FLAWS`.

    `drafts_now` says which processes are draft sides; hits are counted as long as there is one.
    """

    def __init__(self, flaws: dict[int, str] | None = None) -> None:
        assert set((flaws or {}).values()) <= set(FLAWS)
        self.flaws = flaws or {}
        self.url = ""
        self.alive = True
        self.asked: Counter[int] = Counter()
        self.running = 0
        self.piece_seconds = 0.0
        self.of_two_minds: set[int] = set()
        """Requests whose text is another one when they are not alone."""
        self.hits_need_traffic = False
        self.drafts_now: Callable[[], list[int]] = list
        self._hits = 0

    def members(self) -> list[int]:
        return self.drafts_now()

    def drafts(self) -> list[int]:
        return self.drafts_now()

    def snapshot(self) -> list[processes.Process]:
        return [processes.Process(1, "server", 1 << 20, 3, 2)]

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[SoakServer]:
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics), web.post("/v1/completions", self._completions)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        drafts = self.drafts()
        self._hits += len(drafts) if self.running or not self.hits_need_traffic else 0
        lines = [
            "# HELP something",
            f'vllm:num_requests_running{{engine="0"}} {self.running}.0',
            'vllm:num_requests_waiting{engine="0"} 0.0',
            'vllm:kv_cache_usage_perc{engine="0"} 0.0',
            f'vllm:saguaro_hits_total{{engine="0"}} {self._hits}.0',
            f'vllm:saguaro_draft_up{{engine="0"}} {float(bool(drafts))}',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        name = request.headers.get("X-Request-Id", "soak--1")
        index = int(name.removeprefix("soak-"))
        body = await request.json()
        self.asked[index] += 1
        flaw = self.flaws.get(index, "")
        refusal = "" if flaw == "served" else "no" if flaw == "refused" else self._refusal(body)
        if refusal:
            return web.json_response({"error": {"message": refusal, "code": 400}}, status=400)
        if flaw == "error":
            return web.json_response({"error": {"message": "EngineCore died", "code": 500}}, status=500)
        self.running += 1
        try:
            if flaw == "late":
                await asyncio.sleep(60)
            await asyncio.sleep(self.piece_seconds)
            choices = self._choices(index, body, flaw)
            identity = "cmpl-soak-another" if flaw == "another's" else f"cmpl-{name}"
            if body.get("stream"):
                return await self._stream(request, identity, choices, flaw)
            if flaw in ("broken", "no end") and request.transport is not None:
                request.transport.abort()
            return web.json_response({"id": identity, "choices": choices})
        finally:
            self.running -= 1

    @staticmethod
    def _refusal(body: Json) -> str:
        wrong = (
            body["model"] != "pair"
            or body["max_tokens"] > 512
            or (isinstance(body["prompt"], list) and len(body["prompt"]) + body["max_tokens"] > 512)
            or body["temperature"] < 0
            or body.get("top_p", 1) > 1
            or (body["temperature"] == 0 and body.get("n", 1) > 1)
            or body.get("structured_outputs", {}).get("regex") == "(unclosed"
        )
        return "this cannot be" if wrong else ""

    def _choices(self, index: int, body: Json, flaw: str) -> list[Json]:
        about = {key: body.get(key) for key in ("prompt", "max_tokens", "temperature", "seed", "n")}
        words = (
            json.dumps(about, sort_keys=True) if body["temperature"] == 0 or "seed" in body else str(random.random())
        )
        other = index in self.of_two_minds and self.running > 1
        return [self._choice(f"{words}/{at}", at, body, flaw, other) for at in range(body.get("n", 1))]

    @staticmethod
    def _choice(words: str, at: int, body: Json, flaw: str, other: bool) -> Json:
        most = min(body["max_tokens"], 512)
        r = random.Random(hashlib.sha256(words.encode()).digest())
        tokens = [r.randrange(4096) for _ in range(most)]
        if flaw == "short":
            tokens = tokens[:-1]
        if flaw == "wrong token" or other:
            tokens[-1] = 5000
        finish: str | None = "stop" if flaw == "wrong form" else "length"
        if flaw == "no reason":
            finish = None
        text = "".join(f" {token}" for token in tokens)
        choice: Json = {"index": at, "text": text, "token_ids": tokens, "finish_reason": finish, "stop_reason": None}
        if body.get("return_tokens_as_token_ids"):
            gap = 1e-6 if other else 1.0
            choice["logprobs"] = {
                "top_logprobs": [{f"token_id:{token}": -1.0, "token_id:5000": -1.0 - gap} for token in tokens]
            }
        return choice

    async def _stream(self, request: web.Request, name: str, choices: list[Json], flaw: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            if flaw == "no event":
                await response.write(b'data: {"error": {"message": "not so", "code": 400}}\n\ndata: [DONE]\n\n')
                return response
            for choice in choices:
                await self._pieces(response, name, choice, flaw)
            if flaw == "broken" and request.transport is not None:
                request.transport.abort()
            elif flaw == "error event":
                await response.write(
                    b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]\n\n'
                )
            elif flaw != "no end":
                await response.write(b"data: [DONE]\n\n")
        except ConnectionError:  # the client has gone
            pass
        return response

    async def _pieces(self, response: web.StreamResponse, name: str, choice: Json, flaw: str) -> None:
        tokens = choice["token_ids"]
        for start in range(0, len(tokens), 3):
            some = tokens[start : start + 3]
            is_last = start + 3 >= len(tokens)
            if is_last and flaw == "broken":
                return
            piece = choice | {"token_ids": some, "text": "".join(f" {token}" for token in some)}
            if not is_last:
                piece["finish_reason"] = None
            await response.write(f"data: {json.dumps({'id': name, 'choices': [piece]})}\n\n".encode())
            await asyncio.sleep(self.piece_seconds)
