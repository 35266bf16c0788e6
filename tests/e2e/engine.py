"""Real vLLM engines in a process of their own, one after the other, driven by JSON: `python -m tests.e2e.engine`.

Standard input, one JSON object: `cpus` (the cores to stay on, or none), and `engines`, each with `options` (for `LLM`),
`scenarios` and `end`. Standard output, one JSON line an engine, as soon as its scenarios are through. What vLLM writes
to standard output goes to standard error. An engine of several ranks, or in Ray, has its workers in processes of
their own (see `ranks.py`); a scenario there may say `sample_apart`, from which on its ranks are at odds.

A scenario has a `kind`:

    batches   `prompts` in turn, `batch` at a time, through `LLM.generate`; `adapters`: a LoRA's folder each, or null
    stops     greedy texts, then the same prompts again with stops that lie inside those texts
    arrivals  `requests` that come step by step through `llm.llm_engine`, with aborts, and `events` at given steps

`sign`: the file that `await_sign` waits for: until it is there, the engine is between two steps.
`care`: how the draft side is looked after, where that is not as usual: fields of `Care`.
`end`: "shutdown" in order, "raise" an exception, or "wait" for a signal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any
from unittest import mock

from tests.e2e import ranks

Json = dict[str, Any]

TIMEOUT_SECONDS = 900


def main() -> None:
    """Run every engine of the specification on standard input."""
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.load(sys.stdin)
    if spec["cpus"]:
        os.sched_setaffinity(0, spec["cpus"])  # before torch is there: it starts as many threads as there are cores
    for engine in spec["engines"]:
        run_engine(engine, answers)


def run_engine(spec: Json, answers: IO[str]) -> None:
    """Start one engine, run its scenarios, say what came out, and end it as told."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.e2e.sabotage import sabotaged

    with looked_after(spec.get("care")):
        llm = LLM(**spec["options"])
    options = spec["options"]
    apart = options.get("tensor_parallel_size", 1) > 1 or options.get("distributed_executor_backend") == "ray"
    engine = RankedEngine(llm) if apart else Engine(llm)
    engine.sign = spec.get("sign", "")
    answer: Json = {"scenarios": {}, "draft_pid": engine.draft_pid, "pid": os.getpid()} | engine.facts()
    for scenario in spec["scenarios"]:
        before = engine.metrics()
        engine.begin(scenario)
        started = time.perf_counter()
        with sabotaged(scenario.get("sabotage")):
            results = KINDS[scenario["kind"]](engine, scenario)
        after, texts = engine.metrics(), engine.texts_of_ranks()
        answer["scenarios"][scenario["name"]] = {
            "results": results,
            "records": list(engine.records),
            "metrics": {name: value - before.get(name, 0.0) for name, value in after.items()},
            "seconds": time.perf_counter() - started,
            "ranks": texts,
        }
    answer["left"] = engine.left_over()
    answer["draft_pids"] = [*engine.draft_pids, *engine.drafts]
    end = spec.get("end", "shutdown")
    if end == "shutdown":
        started = time.perf_counter()
        llm.llm_engine.engine_core.shutdown()
        answer["shutdown_seconds"] = time.perf_counter() - started
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    if end == "raise":
        raise RuntimeError("the engine's process ends with this")
    while end == "wait":
        time.sleep(3600)
    del llm, engine
    gc.collect()
    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def looked_after(care: Json | None) -> Iterator[None]:
    """An engine that starts while this lasts looks after its draft side so."""
    from vllm_saguaro.placement.restarting import Care, RestartingChannel
    from vllm_saguaro.vllm_hooks import worker

    so = RestartingChannel if care is None else functools.partial(RestartingChannel, care=Care(**care))
    with mock.patch.object(worker, "RestartingChannel", so):
        yield


class Engine:
    """An `LLM` whose inside can be reached, since it runs in this process."""

    sign = ""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.records: list[tuple[str, int, list[int]]] = []
        """What was drafted: request id, tokens of the request at that moment, the drafts."""
        self.draft_pids: list[int] = []
        """Draft processes that something was done to."""
        if llm.llm_engine.vllm_config.speculative_config is not None:
            self._record_drafts()

    def begin(self, scenario: Json) -> None:
        """Before a scenario."""
        self.records.clear()

    def facts(self) -> Json:
        """What is true of this engine from its start on."""
        return {}

    def texts_of_ranks(self) -> list[Json]:
        """Of each rank, where there are several: request id -> the tokens that it had last."""
        return []

    @property
    def draft_pid(self) -> int | None:
        return next(iter(self.drafts), None)

    @property
    def drafts(self) -> list[int]:
        """The draft processes that are there now, the first replica's first."""
        channel = getattr(self.worker, "_channel", None)
        present: list[Any] = [getattr(one, "_present", None) for one in getattr(channel, "_channels", [channel])]
        return [life.pid for life in present if hasattr(life, "pid")]

    def metrics(self) -> dict[str, float]:
        """Counters, vectors and histograms by name, with the labels that tell one engine's apart."""
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            labels = [f"{k}={v}" for k, v in metric.labels.items() if k not in ("model_name", "engine")]
            name = metric.name + ("{" + ",".join(labels) + "}" if labels else "")
            if hasattr(metric, "buckets"):
                found[name + ":count"], found[name + ":sum"] = metric.count, metric.sum
            elif hasattr(metric, "values"):
                found |= {f"{name}[{i}]": value for i, value in enumerate(metric.values)}
            else:
                found[name] = metric.value
        return found

    def left_over(self) -> Json:
        """What the two sides still hold. The last requests leave with the next step that does something: make one."""
        drafter = getattr(self.worker, "_drafter", None)
        if drafter is None:
            return {}
        self.llm.generate([{"prompt_token_ids": [1]}], sampling({"max_tokens": 1}), use_tqdm=False)
        speculator = drafter.speculator
        left = {"requests": len(speculator._requests), "slots_taken": speculator_slots(speculator)}
        engine = getattr(speculator.channel, "_engine", None)
        if engine is not None:
            left["blocks_taken"] = engine.pool.num_blocks - engine.pool.num_free
        return left

    def _record_drafts(self) -> None:
        runner = self.worker.model_runner
        original = runner.propose_draft_token_ids

        def propose(scheduler_output: Any, sampled: Any, *others: Any, **named: Any) -> Any:
            drafts = original(scheduler_output, sampled, *others, **named)
            batch = runner.input_batch
            lengths = batch.num_tokens_no_spec[: batch.num_reqs].tolist()
            if not isinstance(sampled, list):  # vLLM's own drafter is asked before the new tokens are booked
                lengths = [n + int((row >= 0).sum()) for n, row in zip(lengths, sampled, strict=True)]
            rows = drafts if isinstance(drafts, list) else drafts.tolist()
            self.records.extend(zip(batch.req_ids, lengths, map(list, rows), strict=False))
            return drafts

        runner.propose_draft_token_ids = propose


class RankedEngine(Engine):
    """An `LLM` whose workers are in processes of their own, and are asked from here: of several ranks, or in Ray."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.records = []
        self.draft_pids = []
        self._ours = llm.llm_engine.vllm_config.speculative_config is not None
        if self._ours:
            llm.collective_rpc(ranks.record)

    def begin(self, scenario: Json) -> None:
        super().begin(scenario)
        if scenario.get("sample_apart"):
            self.llm.collective_rpc(ranks.sample_apart)

    def facts(self) -> Json:
        if not self._ours:
            return {}
        asked = {"rank_pids": ranks.pid, "drafts_of_ranks": ranks.draft_pid, "blocks": ranks.blocks}
        return {name: self.llm.collective_rpc(function) for name, function in asked.items()}

    def texts_of_ranks(self) -> list[Json]:
        if not self._ours:
            return []
        found = self.llm.collective_rpc(ranks.take_records)
        self.records += found[0][1]
        return [texts for texts, _ in found]

    @property
    def draft_pid(self) -> int | None:
        return self.llm.collective_rpc(ranks.draft_pid)[0] if self._ours else None

    @property
    def drafts(self) -> list[int]:
        return [] if self.draft_pid is None else [self.draft_pid]

    def left_over(self) -> Json:
        return {}


def speculator_slots(speculator: Any) -> int:
    return len(speculator._slots) - len(speculator._slots.free)


# ---- scenarios ------------------------------------------------------------------------------------------------------


def run_batches(engine: Engine, scenario: Json) -> list[Json]:
    prompts, params = scenario["prompts"], scenario["params"]
    each = params if isinstance(params, list) else [params] * len(prompts)
    adapters = [adapter(folder) for folder in scenario.get("adapters", [None] * len(prompts))]
    size = scenario.get("batch") or len(prompts)
    results: list[Json] = []
    for at in range(0, len(prompts), size):
        done = engine.llm.generate(
            [as_prompt(prompt) for prompt in prompts[at : at + size]],
            [sampling(one) for one in each[at : at + size]],
            use_tqdm=False,
            lora_request=adapters[at : at + size],
        )
        results += [describe(output) for output in done]
    return results


def run_stops(engine: Engine, scenario: Json) -> list[Json]:
    """For each prompt and each of the `positions` in its greedy text: stop at the token there, or at the text there.

    A token that occurs earlier is no candidate: the stop would lie elsewhere.
    """
    prompts, params = scenario["prompts"], scenario["params"]
    whole = run_batches(engine, {"prompts": prompts, "params": params})
    tokenizer = engine.llm.get_tokenizer()
    cases: list[Json] = []
    for prompt, result in zip(prompts, whole, strict=True):
        tokens, text = result["outputs"][0]["token_ids"], result["outputs"][0]["text"]
        for position in scenario["positions"]:
            case = {"prompt": prompt, "whole": result, "position": position}
            if tokens[position] not in tokens[:position]:
                cases.append(case | {"params": params | {"stop_token_ids": [tokens[position]]}})
            piece = tokenizer.decode(tokens[position : position + 2])
            if piece.strip() and piece in text:
                cases.append(case | {"params": params | {"stop": [piece]}})
    stopped = run_batches(
        engine, {"prompts": [case["prompt"] for case in cases], "params": [case["params"] for case in cases]}
    )
    return [case | {"stopped": result} for case, result in zip(cases, stopped, strict=True)]


def run_arrivals(engine: Engine, scenario: Json) -> list[Json]:
    """Each request: `key`, `id`, `prompt`, `params`.

    It starts at `step`, or when the request with key `after` has ended, and is aborted as soon as it has `abort_after`
    tokens. An aborted one's result is what it had.
    """
    core = engine.llm.llm_engine
    waiting = list(scenario["requests"])
    events = list(scenario.get("events", ()))
    running: dict[str, Json] = {}
    latest: dict[str, Json] = {}
    ended: set[str] = set()

    def end(request: Json, aborted: bool) -> None:
        ended.add(request["key"])
        del running[request["id"]]
        latest.setdefault(request["key"], {"outputs": [{"token_ids": [], "text": ""}]})["aborted"] = aborted

    step = 0
    while waiting or running:
        for event in [event for event in events if event["step"] <= step]:
            events.remove(event)
            EVENTS[event["do"]](engine)
        for request in [r for r in waiting if r["after"] in ended or (r["after"] is None and r["step"] <= step)]:
            waiting.remove(request)
            running[request["id"]] = request
            core.add_request(request["id"], as_prompt(request["prompt"]), sampling(request["params"]))
        for output in core.step():
            request = running[output.request_id]
            latest[request["key"]] = describe(output)
            if output.finished:
                end(request, aborted=False)
        for request in list(running.values()):
            have = len(latest.get(request["key"], {"outputs": [{"token_ids": []}]})["outputs"][0]["token_ids"])
            if request["abort_after"] is not None and have >= request["abort_after"]:
                core.abort_request([request["id"]])
                end(request, aborted=True)
        step += 1
    return [latest[request["key"]] | {"key": request["key"]} for request in scenario["requests"]]


KINDS: dict[str, Callable[[Engine, Json], list[Json]]] = {
    "batches": run_batches,
    "stops": run_stops,
    "arrivals": run_arrivals,
}


def signal_draft(number: signal.Signals) -> Callable[[Engine], None]:
    def send(engine: Engine) -> None:
        assert engine.draft_pid is not None
        engine.draft_pids.append(engine.draft_pid)
        os.kill(engine.draft_pid, number)

    return send


def starve_draft(engine: Engine) -> None:
    """No more memory for the draft than it has."""
    assert engine.draft_pid is not None
    engine.draft_pids.append(engine.draft_pid)
    resource.prlimit(engine.draft_pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))


def break_draft(engine: Engine) -> None:
    """From now on a draft process ends as soon as it is started."""
    from vllm_saguaro.placement.mailbox import MailboxShape
    from vllm_saguaro.placement.process import ProcessChannel

    shape = MailboxShape(slots=64, branches=1, num_speculative_tokens=1, ring_bytes=4096, support=1)
    engine.worker._channel._start = lambda: ProcessChannel("tests.e2e.no_draft", {}, shape, dict(os.environ))


def await_draft(engine: Engine) -> None:
    """Until all draft processes are there that were asked for, and none to which something was done."""
    asked_for = len(getattr(engine.worker._channel, "_channels", [None]))
    wait_for(lambda: len(engine.drafts) == asked_for and not {*engine.drafts}.intersection(engine.draft_pids))
    wait_for(lambda: engine.worker._channel.alive)


def await_sign(engine: Engine) -> None:
    """Until the test has done what it does between two scenarios."""
    wait_for(lambda: os.path.exists(engine.sign))


def await_left_off(engine: Engine) -> None:
    """Until no more draft process is started."""
    wait_for(lambda: engine.metrics()["vllm:saguaro_draft_left_off"] == 1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the draft side does not do what is waited for")
        time.sleep(0.02)


EVENTS: dict[str, Callable[[Engine], None]] = {
    "kill_draft": signal_draft(signal.SIGKILL),
    "stop_draft": signal_draft(signal.SIGSTOP),
    "continue_draft": signal_draft(signal.SIGCONT),
    "starve_draft": starve_draft,
    "break_draft": break_draft,
    "await_draft": await_draft,
    "await_sign": await_sign,
    "await_left_off": await_left_off,
}


# ---- vLLM's objects -------------------------------------------------------------------------------------------------


def as_prompt(prompt: str | list[int]) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def sampling(params: Json) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asked: Json = {"temperature": 0.0} | params
    if "structured_outputs" in asked:
        asked["structured_outputs"] = StructuredOutputsParams(**asked["structured_outputs"])
    if "logit_bias" in asked:  # JSON has no numbers as keys
        asked["logit_bias"] = {int(token): bias for token, bias in asked["logit_bias"].items()}
    return SamplingParams(**asked)


def adapter(folder: str | None) -> Any:
    """A request for the LoRA in this folder, whose name ends in its number: 1, 2, ..."""
    from vllm.lora.request import LoRARequest

    return folder and LoRARequest(folder, int(folder.rpartition("-")[2]), folder)


def describe(output: Any) -> Json:
    return {
        "request_id": output.request_id,
        "prompt_length": len(output.prompt_token_ids),
        "prompt_logprobs": scores(output.prompt_logprobs),
        "outputs": [
            {
                "token_ids": list(one.token_ids),
                "text": one.text,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "gaps": list(gaps(one.logprobs)) if one.logprobs else None,
                "logprobs": scores(one.logprobs),
            }
            for one in output.outputs
        ],
    }


def scores(logprobs: Any) -> list[dict[int, tuple[float, int]]] | None:
    """Token -> (log-probability, rank), position by position; nothing for a prompt's first token."""
    if not logprobs:
        return None
    return [{token: (one.logprob, one.rank) for token, one in (position or {}).items()} for position in logprobs]


def gaps(logprobs: Any) -> Iterator[float]:
    """How far the likeliest token was ahead of the second, where two are known, token by token."""
    for position in logprobs:
        ranked = sorted((entry.logprob for entry in position.values()), reverse=True)
        yield ranked[0] - ranked[1] if len(ranked) > 1 else float("inf")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
