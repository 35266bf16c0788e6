"""One engine in its own process: loads it, then does one repetition at a time as it is asked.

    python -m vllm_saguaro.benchmark.worker

JSON lines on standard input and output. The first line says what to load (`cores`, `threads`, `llm`, `prompts`,
`prompt_tokens`, `forecasts`), each further one what to run (`batch`, `temperature`, `top_p`, `prompts`, `tokens`); the
end of the input ends the process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import IO, Any

from vllm_saguaro.benchmark import counters
from vllm_saguaro.vllm_hooks.benchmark_probes import ForecastWatch, Stopwatch, watch_drafting


class Worker:
    """A loaded engine and the prompts it is to continue."""

    def __init__(self, order: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.llm = self.load(order)
        self.start_seconds = time.perf_counter() - start
        speculation = order["llm"].get("speculative_config") or {}
        is_draft_model = speculation.get("method") == "draft_model"
        self.stopwatch = watch_drafting(self.llm) if is_draft_model else Stopwatch()
        if is_draft_model:
            # Without it vLLM reads temperatures from uninitialised memory on a CPU: no baseline at T > 0.
            from vllm_saguaro.vllm_hooks import cpu_sampler

            cpu_sampler.mend_kernel()
        self.forecasts = ForecastWatch(self.llm) if order["forecasts"] else None
        tokenizer = self.llm.get_tokenizer()
        longest = order["prompt_tokens"]
        # The end of a long prompt, not its beginning: the text should go on from there.
        self.prompts = [tokenizer.encode(prompt)[-longest:] for prompt in order["prompts"]]
        self.served = 0

    def load(self, order: dict[str, Any]) -> Any:
        """The engine, a `vllm.LLM`."""
        from vllm import LLM

        return LLM(**order["llm"])

    def about(self) -> dict[str, Any]:
        """What is worth keeping about the engine once it stands."""
        import torch

        return {
            "start_seconds": round(self.start_seconds, 2),
            "cores": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        }

    def run(self, batch: int, temperature: float, top_p: float, prompts: int, tokens: int) -> dict[str, Any]:
        """One repetition: the first `prompts` prompts, `batch` at a time, `tokens` new tokens each."""
        gc.collect()
        before = counters.flatten(self.llm.get_metrics())
        judged = self.forecasts.counts() if self.forecasts else {}
        totals = {
            "decode_seconds": 0.0,
            "drafting_seconds": 0.0,
            "tokens": 0,
            "decode_tokens": 0,
            "rounds": 0,
            "steps": 0,
        }
        token_ids: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, prompts, batch):
            together = self.prompts[first : min(first + batch, prompts)]
            group, found = self._run_together(together, temperature, top_p, tokens)
            token_ids += group
            for name, value in found.items():
                totals[name] += value
        wall = time.perf_counter() - start
        after = counters.flatten(self.llm.get_metrics())
        return {
            "wall_seconds": wall,
            **totals,
            "counters": counters.difference(after, before),
            "forecasts": counters.difference(self.forecasts.counts(), judged) if self.forecasts else {},
            "token_ids": token_ids,
        }

    def _run_together(
        self, prompts: Sequence[list[int]], temperature: float, top_p: float, tokens: int
    ) -> tuple[list[list[int]], dict[str, float]]:
        """Continue these prompts at once; the decode part begins when each of them has its first token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=tokens,
            ignore_eos=True,  # every engine makes the same number of tokens
            detokenize=False,  # a server does it in another process
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self.llm.llm_engine
        made: dict[str, list[int]] = {}
        for prompt in prompts:
            name = str(self.served)
            self.served += 1
            made[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        waiting = set(made)
        rounds = steps = before_decode = 0
        begin = end = time.perf_counter()
        drafting = self.stopwatch.seconds
        while engine.has_unfinished_requests():
            outputs = engine.step()
            decoding = not waiting
            for output in outputs:
                new = output.outputs[0].token_ids
                made[output.request_id].extend(new)
                rounds += decoding and bool(new)
                waiting.discard(output.request_id)
            end = time.perf_counter()
            steps += decoding
            if not decoding and not waiting:
                begin, drafting = end, self.stopwatch.seconds
                before_decode = sum(map(len, made.values()))
        total = sum(map(len, made.values()))
        return list(made.values()), {
            "decode_seconds": end - begin,
            "drafting_seconds": self.stopwatch.seconds - drafting,
            "tokens": total,
            "decode_tokens": total - before_decode,
            "rounds": rounds,
            "steps": steps,
        }

    def close(self) -> None:
        """End the engine as its user would, so that nothing of it stays behind."""
        self.llm.llm_engine.engine_core.shutdown()


def serve(orders: IO[str], answers: IO[str], kind: type[Worker] = Worker) -> None:
    """Load, then answer until the orders end. `kind`: what loads and runs."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    worker: Worker | None = None
    try:
        for line in orders:
            order = json.loads(line)
            if worker is None:
                # Before torch is imported: it counts the cores once, when it loads.
                os.sched_setaffinity(0, order["cores"])
                if order["threads"]:
                    os.environ["OMP_NUM_THREADS"] = str(order["threads"])
                worker = kind(order)
                answer(worker.about())
            else:
                answer(worker.run(**order))
    except Exception:
        answer({"error": traceback.format_exc()})
    finally:
        if worker is not None:
            worker.close()


def end_with_parent() -> None:
    """Ask Linux to kill this process when the benchmark dies: a frozen one does not see its input end."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main(kind: type[Worker] = Worker) -> None:
    """Keep the real standard output for the answers; whatever else is printed goes to standard error."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, kind)


if __name__ == "__main__":
    main()
