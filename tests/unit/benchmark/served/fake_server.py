"""A server that streams like vLLM's, in a thread of this process; its texts are a function of prompt and place."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from aiohttp import web

MODEL = "pair"


class FakeServer:
    """`drafts`: tokens a piece, and whether it has our metrics. `odd`: prompts whose text goes another way, from which
    token. `flaw`: what goes wrong with every completion. `others`: tokens that it makes for somebody else meanwhile.
    `blind_after`: from this text on its metrics fail."""

    def __init__(
        self,
        drafts: int = 1,
        odd: dict[str, int] | None = None,
        flaw: str = "",
        others: int = 0,
        models: tuple[str, ...] = (MODEL,),
        ids: bool = True,
        metrics: bool = True,
        longest: int = 1024,
        hits: int = 3,
        blind_after: int | None = None,
    ) -> None:
        self.drafts, self.odd, self.flaw, self.others, self.models = drafts, odd or {}, flaw, others, models
        self.ids, self.metrics, self.longest = ids, metrics, longest
        self.hits, self.blind_after = hits, blind_after
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._at_once = self._made = self._rounds = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/version", self._version),
                web.get("/metrics", self._metrics),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._completions),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, _: web.Request) -> web.Response:
        cards = [{"id": name, "root": f"/models/{name}", "max_model_len": self.longest} for name in self.models]
        return web.json_response({"object": "list", "data": cards})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _metrics(self, _: web.Request) -> web.Response:
        if not self.metrics:
            return web.Response(status=404)
        if self.blind_after is not None and len(self.bodies) >= self.blind_after:
            return web.json_response({"error": {"message": "too busy"}}, status=503)
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self._at_once}.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self._made}.0',
            'vllm:generation_tokens_created{engine="0"} 1.7e9',
        ]
        if self.drafts > 1:
            rounds = self._rounds
            lines += [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {rounds}.0',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {4 * rounds}.0',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {(self.drafts - 1) * rounds}.0',
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {rounds}.0',
                f'vllm:saguaro_hits_total{{engine="0"}} {self.hits * rounds}.0',
                f'vllm:saguaro_misses_total{{cause="late",engine="0"}} {rounds}.0',
                f'vllm:saguaro_target_wait_seconds_sum{{engine="0"}} {0.002 * rounds}',
                f'vllm:saguaro_target_wait_seconds_count{{engine="0"}} {rounds}.0',
                f'vllm:saguaro_target_wait_seconds_bucket{{engine="0",le="0.1"}} {rounds}.0',
            ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.flaw == "refused":
            return web.json_response({"error": {"message": "this prompt is too long"}}, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._stream(response, body)
        finally:
            self._at_once -= 1
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        wanted = body["max_tokens"] - (1 if self.flaw == "short" else 0)
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        start = sum(prompt.encode()) % 100
        turn = self.odd.get(prompt, wanted)
        if "messages" in body:
            await self._send(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        tokens = [start + place + (1000 if place >= turn else 0) for place in range(wanted)]
        for first in range(0, wanted, self.drafts):
            piece = tokens[first : first + self.drafts]
            await asyncio.sleep(0.002)
            if self.flaw == "hangs" and first:
                await asyncio.sleep(60)
            text = "".join(f" {token}" for token in piece)
            choice = {"index": 0, **({"delta": {"content": text}} if "messages" in body else {"text": text})}
            await self._send(response, {"choices": [choice | ({"token_ids": piece} if self.ids else {})]})
            self._made += len(piece) + (self.others if not first else 0)
            self._rounds += 1
        if self.flaw == "error":
            await self._send(response, {"error": {"message": "the engine died"}})
            return
        await self._send(response, {"choices": [], "usage": {"completion_tokens": wanted}})
        if self.flaw != "no end":
            await response.write(b"data: [DONE]\n\n")

    async def _send(self, response: web.StreamResponse, data: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(data)}\n\n".encode())
