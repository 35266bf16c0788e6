"""Engines with Model Runner V2 in a process of their own: `python -m tests.v2.v2_engine`.

Standard input, one JSON object: `engines`, each with `options` (for `LLM`), `async` and `scenarios`. A scenario is one
of `tests.e2e.engine`, and may name a `script` (`scripted_drafts.py`), its `candidates`, a `plant` (`v2_plants.py`), and
`guarded`: no waiting on the host while it runs. The texts of all scenarios so far are what an oracle knows. Standard
output, one JSON object when all are through. What vLLM writes goes to standard error.

An engine of several ranks has its workers in processes of their own, which are asked from here (`v2_ranks.py`); from a
scenario that says `apart` on its ranks are at odds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.e2e.engine import KINDS, Engine
from tests.v2 import interpreted, start_up, v2_ranks
from tests.v2.scripted_drafts import ScriptedDraft
from tests.v2.sync_guard import Synchronised, no_sync
from tests.v2.v2_plants import PLANTS

Json = dict[str, Any]

TIMEOUT_SECONDS = 900


class V2Engine(Engine):
    """An `LLM` in this process, whose draft, if it has one, follows scripts."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.records: list[tuple[str, int, list[int]]] = []
        self.draft_pids: list[int] = []

    @property
    def runner(self) -> Any:
        return self.worker.model_runner

    @property
    def draft(self) -> Any:
        speculator = getattr(self.worker, "_speculator", None)
        return getattr(speculator, "_draft", None)


class RankedV2Engine(Engine):
    """An `LLM` of several ranks."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.records = []
        self.draft_pids = []
        self.ours = llm.llm_engine.vllm_config.speculative_config is not None
        if self.ours:
            llm.collective_rpc(v2_ranks.record)

    def begin(self, scenario: Json) -> None:
        if scenario.get("apart"):
            self.llm.collective_rpc(v2_ranks.go_apart)

    def ranks(self) -> list[list[v2_ranks.Record]]:
        """What each rank has written down since the last time."""
        return self.llm.collective_rpc(v2_ranks.take_records) if self.ours else []

    def rank_facts(self) -> Json:
        return {"ranks": self.llm.collective_rpc(v2_ranks.facts)} if self.ours else {}


def main() -> None:
    """Run every engine of the specification on standard input."""
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.load(sys.stdin)
    interpreted.install()
    texts: list[list[int]] = []
    answers.write(json.dumps([run_engine(engine, texts) for engine in spec["engines"]]))
    answers.flush()
    os._exit(0)  # nothing is left to tidy, and the interpreter's end takes a while


def run_engine(spec: Json, texts: list[list[int]]) -> Json:
    """Start one engine and run its scenarios; `texts` grows by what they gave."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    opened: list[ScriptedDraft] = []

    def open_scripted(options: Json, slots: int, longest: int, device: Any, page: Any) -> ScriptedDraft:
        k, vocab_size = options["num_speculative_tokens"], options["target_vocab_size"]
        opened.append(ScriptedDraft(slots, k, vocab_size, longest))
        return opened[-1]

    scripted: Any = contextlib.nullcontext()
    if spec.get("scripted", True):
        import vllm.v1.worker.cpu.shm  # noqa: F401  stand-ins for CUDA first: the runner's modules bind them

        from vllm_saguaro.vllm_hooks import device_worker

        scripted = mock.patch.object(device_worker, "open_device_draft", open_scripted)
    with scripted, interpreted.async_scheduling(spec.get("async", False)):
        llm = LLM(**spec["options"])
    divided = spec["options"].get("tensor_parallel_size", 1) > 1
    engine: Any = RankedV2Engine(llm) if divided else V2Engine(llm)
    answer: Json = {"scenarios": {}, "facts": engine.rank_facts() if divided else facts(engine)}
    if spec.get("start_up"):
        answer["start_up"] = start_up.walk_through(engine, opened) if opened else start_up.walk_through_stream(engine)
    for scenario in spec["scenarios"]:
        for draft in opened:
            draft.script = scenario.get("script", "none")
            draft.candidates = scenario.get("candidates", draft.candidates)
            draft.references = texts
            draft.recording = not scenario.get("guarded")
            draft.events.clear()
            draft.rounds.clear()
        before = engine.metrics()
        engine.begin(scenario)
        with contextlib.ExitStack() as stack:
            if scenario.get("plant"):
                stack.enter_context(PLANTS[scenario["plant"]](engine))
            guard = stack.enter_context(guarded(engine)) if scenario.get("guarded") else {}
            try:
                results = KINDS[scenario["kind"]](engine, scenario)
            except Synchronised as found:
                answer["synchronised"] = str(found)
                break  # in the midst of a step
        answer["scenarios"][scenario["name"]] = {
            "results": results,
            "events": [event for draft in opened for event in draft.events],
            "rounds": [row for draft in opened for row in draft.rounds],
            "samplings": {name: s.temperature for draft in opened for name, s in draft.samplings.items()},
            "metrics": {name: value - before.get(name, 0.0) for name, value in engine.metrics().items()},
            "guard": guard,
            "ranks": engine.ranks() if divided else [],
        }
        asked = scenario["requests"] if scenario["kind"] == "arrivals" else None
        prompts = [r["prompt"] for r in asked] if asked else scenario["prompts"]
        texts += [p + r["outputs"][0]["token_ids"] for p, r in zip(prompts, results, strict=True)]
    llm.llm_engine.engine_core.shutdown()
    answer["closed"] = [draft.closed for draft in opened]
    del llm, engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


def facts(engine: V2Engine) -> Json:
    config = engine.llm.llm_engine.vllm_config
    return {
        "worker": type(engine.worker).__name__,
        "runner": type(engine.runner).__module__,
        "async": config.scheduler_config.async_scheduling,
        "draft_logits": getattr(getattr(engine.runner, "speculator", None), "draft_logits", None) is not None,
    }


@contextlib.contextmanager
def guarded(engine: V2Engine) -> Iterator[Json]:
    """What makes the host wait in a step's part of ours ends the engine: who goes, who comes, filler, drafts.

    How much went through without.
    """
    import torch

    from vllm_saguaro.vllm_hooks import coupled_sampler

    ours = coupled_sampler.agreed
    seen = {"steps": 0, "propose": 0, "sampler": 0, "agreed": 0, "operations": 0}
    runner, speculator = engine.runner, engine.worker._speculator
    states, marked, propose = runner.req_states, runner.rejection_sampler, speculator.propose
    inner = marked._sampler
    own = [states.all_token_ids.gpu, states.total_len.gpu, states.num_computed_tokens.gpu, states.prefill_len.gpu]
    own += [states.last_sampled_tokens, states.draft_tokens, speculator.ready, *tensors_of(engine.draft)]

    def on_device(batch: Any, *others: Any) -> list[Any]:
        host = batch.seq_lens_cpu_upper_bound
        tensors = [t for t in (*vars(batch).values(), *others) if isinstance(t, torch.Tensor) and t is not host]
        return own + tensors

    def guarded_step(step: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(scheduler_output: Any) -> None:
            with no_sync(own) as guard:
                step(scheduler_output)
            seen["steps"] += 1
            seen["operations"] += guard.operations

        return call

    def guarded_propose(batch: Any, *others: Any, **named: Any) -> Any:
        with no_sync(on_device(batch, *others, *named.values())) as guard:
            drafts = propose(batch, *others, **named)
        seen["propose"] += 1
        seen["operations"] += guard.operations
        return drafts

    class Guarded(type(marked)):  # type: ignore[misc]
        def __call__(self, logits: Any, batch: Any, *others: Any) -> Any:
            with no_sync(on_device(batch, *others)) as guard:

                def unguarded(*arguments: Any) -> Any:
                    guard.paused = True  # vLLM's own sampler is vLLM's business
                    return inner(*arguments)

                def agreed(*arguments: Any) -> Any:
                    guard.watch(each for each in arguments if isinstance(each, torch.Tensor))
                    guard.paused = False  # this is ours, in the midst of it
                    found = ours(*arguments)
                    guard.paused = True
                    seen["agreed"] += 1
                    return found

                self._sampler = unguarded
                with mock.patch.object(coupled_sampler, "agreed", agreed):
                    output = super().__call__(logits, batch, *others)
            seen["sampler"] += 1
            seen["operations"] += guard.operations
            return output

    with (
        mock.patch.object(speculator, "begin_step", guarded_step(speculator.begin_step)),
        mock.patch.object(speculator, "follow_step", guarded_step(speculator.follow_step)),
        mock.patch.object(speculator, "propose", guarded_propose),
        mock.patch.object(runner, "rejection_sampler", Guarded(inner, marked._ready)),
    ):
        yield seen


def tensors_of(draft: Any) -> list[Any]:
    """What a real draft keeps on the device of each request."""
    if (engine := getattr(draft, "engine", None)) is not None:
        return [getattr(held, name) for held in (engine.state, engine.round.step) for name in held.__slots__]
    return [state] if (state := getattr(draft, "_state", None)) is not None else []


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a rank's process, which vLLM spawns: nothing of vLLM is imported yet
    interpreted.install()
