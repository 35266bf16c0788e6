"""One engine in a process of its own: loads it, then does what it is asked, one order a line.

    python -m scripts.gpu_checking.engine

JSON lines on standard input and output, as in `benchmark/worker.py`; the first line says what to load. An order that
fails is answered with `error`, and the next one is taken.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_checking import hit_cost, waits
from scripts.gpu_checking.timeline import overlap_of
from scripts.gpu_checking.widened import register_loader
from vllm_saguaro.benchmark import counters
from vllm_saguaro.benchmark.worker import end_with_parent

Json = dict[str, Any]


class CheckedEngine:
    """A loaded `LLM`, and what the check looks at inside of it."""

    def __init__(self, order: Json) -> None:
        if order["interpreted"]:
            importlib.import_module("tests.v2.interpreted").install()
        register_loader()
        from vllm import LLM

        import vllm_saguaro

        vllm_saguaro.register()  # where the project is on the path, but not installed, vLLM does not find it
        start = time.perf_counter()
        self.llm = LLM(**order["llm"])
        self.start_seconds = time.perf_counter() - start
        longest = order["prompt_tokens"]
        self._prompts = [self.llm.get_tokenizer().encode(prompt)[-longest:] for prompt in order["prompts"]]
        self._served = 0

    @property
    def worker(self) -> Any:
        """vLLM's worker: the engine is in this process."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    @property
    def speculator(self) -> Any:
        """The speculator of runner V2."""
        return self.worker.model_runner.speculator

    @property
    def draft(self) -> Any:
        """Saguaro's draft; raises RuntimeError where it has failed or there is none."""
        draft = getattr(self.speculator, "_draft", None)
        # One on a stream says so itself, one in a process has a life or none
        alive = getattr(draft, "alive", None) or getattr(draft, "_life", None)
        if not alive:
            raise RuntimeError("the draft has failed: the engine's log says why")
        return draft

    # ---- orders ------------------------------------------------------------------------------------------------------

    def about(self) -> Json:
        """What is worth keeping once the engine stands."""
        config = self.llm.llm_engine.vllm_config
        return {
            "start_seconds": round(self.start_seconds, 1),
            "runner": type(self.worker.model_runner).__module__,
            "worker": type(self.worker).__name__,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "kv_blocks": config.cache_config.num_gpu_blocks,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        }

    def speed(self, batch: int, temperature: float, prompts: int, tokens: int) -> Json:
        """The first `prompts` prompts, `batch` at a time; time counts from when each of a batch has a token."""
        before = counters.flatten(self.llm.get_metrics())
        seconds = made = steps = 0.0
        for first in range(0, prompts, batch):
            found = self._together(self._prompts[first : first + batch], tokens, temperature=temperature)
            seconds, made, steps = seconds + found["seconds"], made + found["decoded"], steps + found["steps"]
        counted = counters.difference(counters.flatten(self.llm.get_metrics()), before)
        return {"seconds": seconds, "tokens": made, "steps": steps, "counters": counted}

    def texts(self, prompts: int, tokens: int, gaps: bool) -> Json:
        """Greedy texts, all at once; with `gaps`, also by how much each token was ahead of the second."""
        more = {"logprobs": 2} if gaps else {}
        found = self._together(self._prompts[:prompts], tokens, temperature=0.0, **more)
        return {"token_ids": found["token_ids"], "gaps": found["gaps"]}

    def samples(self, count: int, batch: int, tokens: int) -> Json:
        """Many texts after one prompt at temperature 1."""
        texts: list[list[int]] = []
        for first in range(0, count, batch):
            found = self._together([self._prompts[0]] * min(batch, count - first), tokens, temperature=1.0)
            texts += found["token_ids"]
        return {"token_ids": texts}

    def no_sync(self, batch: int, tokens: int) -> Json:
        """Serve with every wait of the host for the device noted; on a CPU, a read of ours ends the engine."""
        with waits.watched(self.worker) as found:
            self._together(self._prompts[:batch], tokens, temperature=0.0)
            self._together(self._prompts[:batch], tokens, temperature=1.0)
        assert self.draft
        return found.to_json()

    def hit(self, batch: int, tokens: int) -> Json:
        """What the target's stream waits for in a round, in microseconds; at a temperature: with q if there is one."""
        on_gpu = torch.cuda.is_available()
        with hit_cost.timed(self.draft, hit_cost.CudaMark if on_gpu else hit_cost.HostMark) as rounds:
            self._together(self._prompts[:batch], tokens, temperature=1.0)
        if on_gpu:
            torch.cuda.synchronize()
        assert self.draft
        return hit_cost.summary(rounds, batch)

    def graphs(self) -> Json:
        """How many CUDA graphs the draft has, and how many it should: a look-up and a round for each bucket."""
        draft = self.draft
        return {"captured": len(draft._calls._graphs), "expected": 2 * len(draft.engine.buckets)}

    def memory(self, batch: int, tokens: int) -> Json:
        """Bytes: what the draft says it holds, what it holds at least; what serving adds to the used memory."""
        draft, model = self.draft, self.draft.engine.model
        least = sum(t.nbytes for t in {t.data_ptr(): t for t in model.model.parameters()}.values())
        least += sum(pages.nbytes for pages in model.pages)
        answer = {"resident": draft.resident_bytes, "weights_and_kv": least}
        if torch.cuda.is_available():
            before = torch.cuda.mem_get_info()
            self._together(self._prompts[:batch], tokens, temperature=1.0)
            torch.cuda.synchronize()
            after = torch.cuda.mem_get_info()
            utilisation = self.llm.llm_engine.vllm_config.cache_config.gpu_memory_utilization
            answer |= {
                "grown": before[0] - after[0],
                "used": after[1] - after[0],
                "allowed": int(utilisation * after[1]),
                "reserved": torch.cuda.memory_reserved(),
            }
        return answer

    def timeline(self, batch: int, tokens: int, trace: str) -> Json:
        """A profiler's trace of some steps, and how much of the draft's work is hidden behind the target's."""
        from torch.profiler import ProfilerActivity, profile

        assert self.draft
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self._together(self._prompts[:batch], tokens, temperature=0.0)
            torch.cuda.synchronize()
        profiler.export_chrome_trace(trace)
        return overlap_of(Path(trace))

    # ------------------------------------------------------------------------------------------------------------------

    def _together(self, prompts: list[list[int]], tokens: int, **sampling: Any) -> Json:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, **sampling
        )
        texts: dict[str, list[int]] = {}
        gaps: dict[str, list[float]] = {}
        for prompt in prompts:
            name, self._served = str(self._served), self._served + 1
            texts[name], gaps[name] = [], []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        waiting, begin, at_first, steps = set(texts), 0.0, 0, 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps += not waiting
            for output in outputs:
                new = output.outputs[0]
                texts[output.request_id] += new.token_ids
                gaps[output.request_id] += [_gap(each) for each in new.logprobs or ()]
                if new.token_ids:
                    waiting.discard(output.request_id)
            if not waiting and not begin:
                begin, at_first = time.perf_counter(), sum(map(len, texts.values()))
        return {
            "token_ids": list(texts.values()),
            "gaps": list(gaps.values()),
            "seconds": time.perf_counter() - begin,
            "decoded": sum(map(len, texts.values())) - at_first,
            "steps": steps,
        }


ORDERS: dict[str, Callable[..., Json]] = {
    "speed": CheckedEngine.speed,
    "texts": CheckedEngine.texts,
    "samples": CheckedEngine.samples,
    "no_sync": CheckedEngine.no_sync,
    "hit": CheckedEngine.hit,
    "graphs": CheckedEngine.graphs,
    "memory": CheckedEngine.memory,
    "timeline": CheckedEngine.timeline,
}


def _gap(candidates: dict[int, Any]) -> float:
    """Nats between the two likeliest tokens at a place."""
    best = sorted((found.logprob for found in candidates.values()), reverse=True)
    return float(best[0] - best[1]) if len(best) > 1 else float("inf")


def main() -> None:
    """Load, then answer until the orders end."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: CheckedEngine | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if engine is None:
                engine = CheckedEngine(order)
                answer = engine.about()
            else:
                gc.collect()
                answer = ORDERS[order.pop("order")](engine, **order)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if engine is None:
            break
    if engine is not None:
        engine.llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
