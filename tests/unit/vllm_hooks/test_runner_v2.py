"""The speculator of runner V2 between a runner and a draft that are not there: what is told, what comes back."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.device_messages import DeviceDrafts, DeviceOutcomes
from vllm_saguaro.messages import Miss, Noise, Sampling
from vllm_saguaro.vllm_hooks.device_counters import DeviceCounters
from vllm_saguaro.vllm_hooks.runner_v2 import SaguaroSpeculator, install

SLOTS, K, VOCAB, LONGEST = 4, 3, 20, 8


@dataclass
class NotedDraft:
    """Notes all calls; its drafts are 11, 12, 13 for every row, `ready` of them real."""

    ready: int = K
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    outcomes: list[DeviceOutcomes] = field(default_factory=list)
    fails_at: str = ""
    first: int = 11
    resident_bytes: int = 0
    sampling_c: float | None = None
    branches: int | None = 7

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails_at:
            raise RuntimeError("out of order")

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        self._note("admit", slot, request_id, list(token_ids), sampling)

    def release(self, slot: int, request_id: str) -> None:
        self._note("release", slot, request_id)

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        self._note("exchange")
        self.outcomes.append(outcomes)
        rows = outcomes.slots.shape[0]
        tokens = torch.arange(self.first, self.first + K).repeat(rows, 1)
        return DeviceDrafts(tokens, torch.full((rows,), self.ready, dtype=torch.int32))

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        self._note("logits_into", draft_logits)

    def capture(self) -> None:
        self._note("capture")

    def close(self) -> None:
        self._note("close")

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


class Runner:
    """The runner's state, and steps of it."""

    def __init__(self, draft: NotedDraft | None, with_q: bool = True) -> None:
        self.states = SimpleNamespace(
            max_num_reqs=SLOTS,
            vocab_size=VOCAB,
            device=torch.device("cpu"),
            req_id_to_index={},
            total_len=SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)),
        )
        self.page = CounterPage()
        self.last_sampled = torch.arange(SLOTS).view(-1, 1) + 1
        self.temperature = torch.zeros(SLOTS)
        counted = DeviceCounters(self.page, self.states.device)
        self.speculator = SaguaroSpeculator(self.states, K, LONGEST, with_q, counted)
        if draft is not None:
            self.speculator.attach(draft)

    def step(
        self, new: dict[str, Any] | None = None, finished: Sequence[str] = (), preempted: Sequence[str] = ()
    ) -> None:
        """Take in who comes, (slot, token ids[, params]) by name, and who goes."""
        came = []
        for name, (_, token_ids, *rest) in (new or {}).items():
            params = rest[0] if rest else SamplingParams(temperature=0.0)
            came.append(
                SimpleNamespace(
                    req_id=name,
                    sampling_params=params,
                    prefill_token_ids=token_ids,
                    prompt_len=len(token_ids),
                    prompt_embeds=rest[1] if len(rest) > 1 else None,
                )
            )
        output: Any = SimpleNamespace(
            scheduled_new_reqs=came, finished_req_ids=set(finished), preempted_req_ids=set(preempted) or None
        )
        self.speculator.begin_step(output)
        for name in (*finished, *preempted):
            self.states.req_id_to_index.pop(name, None)
        for new_one in came:
            slot = (new or {})[new_one.req_id][0]
            self.states.req_id_to_index[new_one.req_id] = slot
            self.states.total_len.gpu[slot] = len(new_one.prefill_token_ids)
            self.temperature[slot] = new_one.sampling_params.temperature
        self.speculator.follow_step(output)

    def propose(
        self,
        slots: Sequence[int],
        sampled: Sequence[int],
        dummy: bool = False,
        left: int = 0,
        rejected: Sequence[int] = (),
        taken: int = K,
    ) -> Tensor:
        """Rows in these slots, of whose prompts `left` tokens are not read after this step.

        `taken`: drafts that the runner hands over, the first ones; it writes over the others.
        """
        rows = len(slots)
        batch: Any = SimpleNamespace(
            num_reqs=rows,
            req_ids=[f"row {slot}" for slot in slots],
            idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(slots),
            is_prefilling_np=np.full(rows, left > 0),
            num_computed_prefill_tokens_np=np.full(rows, 4),
            num_scheduled_tokens=np.full(rows, 2),
            prefill_len_np=np.full(rows, 6 + left),
        )
        self.states.total_len.gpu[torch.tensor(slots)] += torch.tensor(sampled, dtype=torch.int32)
        drafts = self.speculator.propose(
            batch,
            None,
            None,
            torch.empty(0),
            None,
            torch.tensor(sampled, dtype=torch.int32),
            torch.tensor(rejected or [0] * rows, dtype=torch.int32),
            self.last_sampled,
            torch.empty(0),
            self.temperature,
            torch.empty(0),
            dummy_run=dummy,
            num_speculative_tokens=taken,
        )
        given = drafts.clone()
        drafts[:, taken:] = -1
        return given

    @property
    def ready(self) -> list[int]:
        return self.speculator.ready.tolist()


SAMPLED = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)


# Who comes and goes


def test_a_request_is_admitted_into_the_slot_that_the_runner_gave_it() -> None:
    draft = NotedDraft()
    Runner(draft).step({"a": (2, [5, 6], SAMPLED)})
    expected = Sampling(temperature=0.7, top_k=5, top_p=0.9, prompt_length=2)
    assert draft.calls == [("admit", 2, "a", [5, 6], expected)]


def test_a_slot_is_let_go_of_before_it_is_given_again() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    runner.step({"b": (1, [6])}, finished=["a"])
    assert [call[:3] for call in draft.calls] == [("admit", 1, "a"), ("release", 1, "a"), ("admit", 1, "b")]


def test_a_preempted_request_comes_back_with_what_it_had_said() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    runner.step(preempted=["a"])
    runner.step({"a": (3, [5, 6, 7])})
    assert [call[:4] for call in draft.calls] == [
        ("admit", 1, "a", [5]),
        ("release", 1, "a"),
        ("admit", 3, "a", [5, 6, 7]),
    ]


def test_a_request_with_new_input_is_a_new_one() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    runner.step({"a": (1, [5, 6, 7])})
    assert [call[0] for call in draft.calls] == ["admit", "release", "admit"]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ((0, list(range(LONGEST))), "longer than the draft can hold"),
        ((0, []), "no text"),
        ((0, [1, 2], SAMPLED, torch.empty(0)), "a text of embeddings"),
    ],
)
def test_what_the_draft_cannot_hold_goes_on_without_drafts(request_: Any, why: str) -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": request_})
    assert not draft.calls, why
    assert runner.propose([0], [1]).tolist() == [[11, 12, 13]]
    assert runner.ready[0] == 0, "whatever the draft says of a slot that it was not given"
    assert runner.page.value(counters.MISSES[Miss.ABSENT]) == 1
    runner.step(finished=["a"])
    assert not draft.named("release")


# Drafts


def test_the_draft_hears_the_outcomes_by_row() -> None:
    draft = NotedDraft(ready=2)
    runner = Runner(draft)
    runner.step({"a": (2, [5, 6]), "b": (0, [7], SAMPLED)})
    assert runner.propose([2, 0], [1, 3], rejected=[2, 1]).tolist() == [[11, 12, 13]] * 2
    (outcomes,) = draft.outcomes
    assert outcomes.slots.tolist() == outcomes.slots_on_host.tolist() == [2, 0]
    assert outcomes.request_ids == ["row 2", "row 0"]
    assert (outcomes.accepted.tolist(), outcomes.accepted.dtype) == ([0, 2], torch.int32)
    assert (outcomes.verified.tolist(), outcomes.verified.dtype) == ([2, 3], torch.int32)
    assert outcomes.bonus.tolist() == [3, 1]
    assert outcomes.lengths.tolist() == [3, 4]
    assert outcomes.temperature.tolist() == [0.0, pytest.approx(0.7)]
    assert runner.ready == [2, 0, 2, 0]
    assert runner.page.value(counters.HITS) == 2


def test_a_step_that_hands_over_no_drafts_is_one_for_the_draft() -> None:
    """As vLLM schedules none for some batch sizes: in the next pass there is none, and the outcome says so."""
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5]), "b": (2, [6], SAMPLED)})
    for _ in range(2):
        assert runner.propose([1, 2], [1, 1], taken=0).tolist() == [[11, 12, 13]] * 2
        assert runner.ready == [0, K, K, 0]
    assert runner.propose([1, 2], [1, 1]).tolist() == [[11, 12, 13]] * 2, "what the runner writes over comes anew"
    assert [o.verified.tolist() for o in draft.outcomes] == [[0, 0]] * 3
    assert [o.accepted.tolist() for o in draft.outcomes] == [[0, 0]] * 3
    assert [o.lengths.tolist() for o in draft.outcomes] == [[2, 2], [3, 3], [4, 4]]
    assert len(draft.named("logits_into")) == 3


def test_a_row_without_a_token_has_no_drafts() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5]), "b": (2, [6])})
    runner.propose([1, 2], [1, 0])
    assert draft.outcomes[0].accepted.tolist() == [0, -1]
    assert runner.ready == [0, K, 0, 0]
    assert runner.page.value(counters.HITS) == 1


def test_a_step_that_only_reads_prompts_is_none_for_the_draft() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    assert runner.propose([1], [0], left=1).tolist() == [[2, 2, 2]], "valid ids all the same"
    assert not draft.outcomes
    assert runner.ready[1] == 0
    runner.propose([1], [1])
    assert len(draft.outcomes) == 1


def test_dummy_runs_touch_nothing() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    runner.propose([1], [1])
    assert runner.propose([0, 1, 2], [1, 1, 1], dummy=True).shape == (3, K)
    assert len(draft.outcomes) == 1
    assert runner.ready == [0, K, 0, 0]


def test_warming_up_books_nothing() -> None:
    runner = Runner(NotedDraft())
    runner.speculator.ready.fill_(2)
    runner.speculator.warm_up()
    assert runner.ready == [0] + [2] * (SLOTS - 1), "the first slot is nobody's yet"
    counted = runner.speculator._counters
    assert counted is not None
    counted.counted()
    assert runner.page.value(counters.HITS) == 0
    assert not any(runner.page.value(counter) for counter in counters.MISSES.values())
    counted.counts += 1
    counted.counted()
    assert runner.page.value(counters.HITS) == 1, "it would have been seen"


def test_drafts_of_another_shape_are_a_failed_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would leave the rows that it is not given as they were."""
    runner = Runner(NotedDraft())
    runner.step({"a": (1, [5]), "b": (2, [6])})
    one = DeviceDrafts(torch.zeros(1, K, dtype=torch.int64), torch.full((1,), K, dtype=torch.int32))
    monkeypatch.setattr(NotedDraft, "exchange", lambda self, outcomes: one)
    assert runner.propose([1, 2], [1, 1]).tolist() == [[2] * K, [3] * K]
    assert runner.ready[1:3] == [0, 0]
    runner.speculator.close()
    assert runner.page.value(counters.DRAFT_LEFT_OFF) == 1


def test_a_new_request_does_not_inherit_the_drafts_of_its_slot() -> None:
    runner = Runner(NotedDraft())
    runner.step({"a": (1, [5])})
    runner.propose([1], [1])
    assert runner.ready[1] == K
    runner.step({"b": (1, [6])}, finished=["a"])
    assert runner.ready[1] == 0


@pytest.mark.parametrize(("first", "expected"), [(-5, [[0, 0, 0]]), (VOCAB - 1, [[VOCAB - 1] * 3])])
def test_no_id_leaves_the_vocabulary(first: int, expected: list[list[int]]) -> None:
    runner = Runner(NotedDraft(first=first))
    runner.step({"a": (1, [5])})
    assert runner.propose([1], [1]).tolist() == expected


# q


def test_q_is_asked_for_where_a_request_has_a_temperature() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5]), "b": (2, [6], SAMPLED)})
    runner.propose([1], [1])
    assert not draft.named("logits_into")
    runner.propose([1, 2], [1, 1])
    ((_, logits),) = draft.named("logits_into")
    assert id(logits) == id(runner.speculator.draft_logits)
    assert (tuple(logits.shape), logits.dtype) == ((SLOTS, K, VOCAB), torch.float32)


def test_c_is_told_where_a_request_has_a_temperature() -> None:
    draft = NotedDraft(sampling_c=0.3)
    runner = Runner(draft)
    runner.step({"a": (1, [5]), "b": (2, [6], SAMPLED)})
    runner.propose([1], [1])
    assert math.isnan(runner.page.value(counters.SAMPLING_C))
    runner.propose([1, 2], [1, 1])
    assert runner.page.value(counters.SAMPLING_C) == 0.3
    draft.fails_at = "exchange"
    runner.propose([1, 2], [1, 1])
    assert math.isnan(runner.page.value(counters.SAMPLING_C)), "it has failed"


def test_k_and_n_are_told() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    runner.propose([1], [1])
    told = [runner.page.value(gauge) for gauge in (counters.DRAFTS, counters.BRANCHES)]
    draft.branches = None
    runner.propose([1], [1])
    assert told == [K, 7] == [runner.page.value(gauge) for gauge in (counters.DRAFTS, counters.BRANCHES)]
    draft.fails_at = "exchange"
    runner.propose([1], [1])
    assert runner.page.value(counters.DRAFTS) == runner.page.value(counters.BRANCHES) == 0


def test_drafts_that_are_never_drawn_have_no_q() -> None:
    draft = NotedDraft()
    runner = Runner(draft, with_q=False)
    runner.step({"b": (2, [6], SAMPLED)})
    runner.propose([2], [1])
    assert runner.speculator.draft_logits is None
    assert not draft.named("logits_into")


def test_the_seed_of_the_slot_is_the_drafts_where_it_decides_the_tokens() -> None:
    draft = NotedDraft()
    runner = Runner(draft, with_q=False)
    seeds = np.zeros(SLOTS, dtype=np.int64)
    runner.speculator.know_noise(seeds)
    seeds[2] = -(2**62)
    structured = SamplingParams(temperature=0.7, structured_outputs=StructuredOutputsParams(choice=["a"]))
    runner.step({"a": (1, [5]), "b": (2, [6], SAMPLED)})
    greedy, sampled = (call[-1] for call in draft.calls)
    assert not greedy.coupled
    assert sampled.coupled
    assert (sampled.noise, sampled.seed) == (Noise.POSITION, -(2**62))
    seeds[2] = 17
    runner.step({"c": (2, [6], structured)}, finished=["b"])
    assert draft.calls[-1][-1].seed == 17, "a grammar is no reason to draft without the noise"


def test_under_structured_output_the_draft_takes_a_request_for_greedy() -> None:
    draft = NotedDraft()
    runner = Runner(draft)
    params = SamplingParams(temperature=0.7, structured_outputs=StructuredOutputsParams(choice=["a"]))
    runner.step({"a": (1, [5], params)})
    assert draft.calls[0][-1] == Sampling(prompt_length=1)
    runner.propose([1], [1])
    assert draft.outcomes[0].temperature.tolist() == [0.0]
    assert draft.named("logits_into"), "the verifier reads its row all the same"
    runner.step({"b": (1, [6], SAMPLED)}, finished=["a"])
    runner.propose([1], [1])
    assert draft.outcomes[1].temperature.tolist() == [pytest.approx(0.7)]


# Faults


@pytest.mark.parametrize("what", ["admit", "release", "exchange", "logits_into"])
def test_a_draft_that_fails_is_closed_and_the_requests_go_on(what: str) -> None:
    draft = NotedDraft(fails_at=what)
    runner = Runner(draft)
    runner.step({"a": (1, [5], SAMPLED)})
    runner.propose([1], [1])
    runner.step({"b": (2, [6])}, finished=["a"])
    assert runner.propose([2], [1]).tolist() == [[3, 3, 3]]
    assert runner.ready[2] == 0
    runner.speculator.close()
    assert len(draft.named("close")) == 1
    assert runner.page.value(counters.DRAFT_LEFT_OFF) == 1
    called = len(draft.calls)
    runner.step({"c": (3, [6])}, finished=["b"])
    runner.propose([3], [1])
    runner.speculator.close()
    assert len(draft.calls) == called, "it is not called any more"


def test_no_pass_waits_for_the_end_of_a_draft_that_failed() -> None:
    draft, may_end, by = NotedDraft(fails_at="exchange"), threading.Event(), list[threading.Thread]()

    def close() -> None:
        by.append(threading.current_thread())
        if by != [threading.main_thread()]:
            may_end.wait(600)
            runner.page.count_in(counters.DRAFT_UP, -1)

    draft.close = close  # type: ignore[method-assign]
    runner = Runner(draft)
    runner.page.set(counters.DRAFT_UP, 1)
    runner.step({"a": (1, [5])})
    for _ in range(2):
        assert runner.propose([1], [1]).tolist() == [[2, 2, 2]]
    assert runner.page.value(counters.DRAFT_LEFT_OFF) == 1
    assert runner.page.value(counters.DRAFT_UP) == 1, "it has not ended yet"
    may_end.set()
    runner.speculator.close()
    assert len(by) == 1
    assert by != [threading.main_thread()]
    assert runner.page.value(counters.DRAFT_UP) == 0, "the worker's end has waited for it"


def test_a_draft_that_cannot_even_be_closed_harms_nobody() -> None:
    draft = NotedDraft(fails_at="exchange")
    draft.close = lambda: 1 / 0  # type: ignore[method-assign, assignment]
    runner = Runner(draft)
    runner.step({"a": (1, [5])})
    assert runner.propose([1], [1]).tolist() == [[2, 2, 2]]


def test_without_a_draft_every_row_is_filler() -> None:
    runner = Runner(None)
    runner.step({"a": (1, [5])})
    assert runner.propose([1], [1]).tolist() == [[2, 2, 2]]
    assert runner.ready == [0] * SLOTS


# Start and end


def test_the_draft_captures_once_when_the_cache_is_there() -> None:
    draft = NotedDraft()
    speculator = Runner(draft).speculator
    speculator.init_cudagraph_manager(None)
    speculator.capture()
    assert not draft.calls
    speculator.cache_is_there()
    speculator.capture()
    speculator.capture()
    assert draft.calls == [("capture",)]


def test_a_draft_that_cannot_be_captured_does_not_keep_the_engine_from_starting() -> None:
    draft = NotedDraft(fails_at="capture")
    runner = Runner(draft)
    runner.speculator.cache_is_there()
    runner.speculator.capture()
    assert len(draft.named("close")) == 1
    assert runner.page.value(counters.DRAFT_LEFT_OFF) == 1
    runner.step({"a": (1, [5])})
    assert runner.propose([1], [1]).tolist() == [[2, 2, 2]]


def test_it_is_closed_once() -> None:
    draft = NotedDraft()
    speculator = Runner(draft).speculator
    speculator.close()
    speculator.close()
    assert draft.calls == [("close",)]


def test_only_vllms_own_speculator_is_replaced() -> None:
    runner = SimpleNamespace(speculator=object())
    with pytest.raises(RuntimeError, match="expected vLLM's own draft_model speculator, found"):
        install(runner, Runner(None).speculator)
