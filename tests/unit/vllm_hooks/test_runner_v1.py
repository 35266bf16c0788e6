"""What the runner's own data becomes on the way to the speculator, and back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_saguaro import counters
from vllm_saguaro.counters import CounterPage
from vllm_saguaro.messages import Noise, Sampling
from vllm_saguaro.turn import Verified
from vllm_saguaro.vllm_hooks.known_noise import RequestKeys
from vllm_saguaro.vllm_hooks.runner_v1 import SaguaroDrafter, SilentDrafter, install


class Listener:
    """A speculator that writes down what it is told."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, list[int], Sampling]] = []
        self.left: list[str] = []
        self.rows: list[Verified] = []
        self.most: int | None = None
        self.tokens_in: int | None = None
        self.ready = False
        self.page = CounterPage()
        self.may_close, self.closed = threading.Event(), list[threading.Thread]()
        self.channel = SimpleNamespace(wait_until_ready=lambda: setattr(self, "ready", True), close=self._close)
        self.fails_at = ""
        self.calls: list[str] = []

    def _close(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.may_close.wait(600)
        self.closed.append(threading.current_thread())

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise RuntimeError("out of order")

    def begin_step(self, arrived: Sequence[tuple[str, list[int], Sampling]], left: Sequence[str]) -> None:
        self._note("begin_step")
        self.arrived += arrived
        self.left += left

    def propose(self, rows: Sequence[Verified], most: int | None, tokens_in: int | None) -> list[list[int]]:
        self._note("propose")
        self.rows, self.most, self.tokens_in = list(rows), most, tokens_in
        return [[len(row.sampled)] for row in rows]

    def proposals(self, request_id: str, count: int) -> tuple[str, int]:
        self._note("proposals")
        return request_id, count


def vllms_own() -> DraftModelProposer:
    """A drafter as the runner makes it, but empty."""
    return DraftModelProposer.__new__(DraftModelProposer)


class Stage:
    """A runner with two requests in its batch, and our drafter in it."""

    def __init__(self, keyed: bool = True, guesses: bool = True, max_model_len: int = 32, has_q: bool = True) -> None:
        tokens = np.zeros((3, 32), dtype=np.int32)
        tokens[0, :8] = [1, 2, 3, 9, 8, 1, 2, 3]
        tokens[1, :5] = [4, 5, 6, 7, 8]
        batch = SimpleNamespace(req_ids=["a", "b"], num_tokens_no_spec=np.array([8, 5, 0]), token_ids_cpu=tokens)
        params = {"a": SamplingParams(temperature=0.5, top_k=7), "b": SamplingParams(temperature=0.0)}
        self.runner: Any = SimpleNamespace(
            drafter=vllms_own(),
            input_batch=batch,
            requests={
                name: SimpleNamespace(sampling_params=params[name], num_prompt_tokens=4 + i)
                for i, name in enumerate(params)
            },
            speculative_config=SimpleNamespace(disable_padded_drafter_batch=False),
            effective_drafter_max_model_len=64,
            max_model_len=max_model_len,
        )
        self.listener = Listener()
        self.keys = RequestKeys(0, known=True, keyed=keyed)
        speculator: Any = self.listener
        self.drafter = SaguaroDrafter(speculator, self.runner, self.keys, guesses, has_q)
        install(self.runner, self.drafter)

    def propose(self, sampled: list[list[int]], tokens_in: int, most: int | None = None, **in_pass: int) -> Any:
        output: Any = SimpleNamespace(
            scheduled_spec_decode_tokens={name: [7] * count for name, count in in_pass.items()},
            total_num_scheduled_tokens=tokens_in,
            num_spec_tokens_to_schedule=most,
        )
        return self.runner.propose_draft_token_ids(output, sampled, "metadata", "hidden")

    def begin(self, *new: tuple[str, list[int] | None, SamplingParams | None], left: Sequence[str] = ()) -> None:
        requests = [
            SimpleNamespace(req_id=name, prompt_token_ids=prompt, sampling_params=params)
            for name, prompt, params in new
        ]
        output: Any = SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(left))
        self.drafter.begin_step(output)


# ---- installing -----------------------------------------------------------------------------------------------------


def test_our_drafter_takes_the_place_of_vllms_own() -> None:
    stage = Stage()
    assert stage.runner.drafter is stage.drafter
    assert isinstance(stage.drafter, DraftModelProposer), "the runner asserts so"
    assert stage.runner.speculative_config.disable_padded_drafter_batch
    assert stage.runner.effective_drafter_max_model_len == sys.maxsize
    stage.drafter.load_model(None)
    assert stage.listener.ready


@pytest.mark.parametrize("drafter", [None, SimpleNamespace(), SaguaroDrafter.__new__(SaguaroDrafter)])
def test_another_drafter_in_its_place_is_an_error(drafter: Any) -> None:
    listener: Any = Listener()
    runner: Any = SimpleNamespace(drafter=drafter, speculative_config=SimpleNamespace())
    with pytest.raises(RuntimeError, match="expected vLLM's own draft_model drafter"):
        install(runner, SaguaroDrafter(listener, runner, RequestKeys(0, True, True), False))
    assert runner.drafter is drafter


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_a_row_is_what_the_batch_says_of_its_request() -> None:
    stage = Stage()
    assert stage.propose([[2, 3], [8]], tokens_in=5, most=3, a=3) == [[2], [1]]
    first, second = stage.listener.rows
    assert (first.request_id, first.sampled, first.verified, first.length) == ("a", [2, 3], 3, 8)
    assert (second.request_id, second.sampled, second.verified, second.length) == ("b", [8], 0, 5)
    assert (first.greedy, second.greedy) == (False, True)
    assert list(first.tokens()) == [1, 2, 3, 9, 8, 1, 2, 3]
    assert list(second.tokens()) == [4, 5, 6, 7, 8]
    assert (list(first.guess(2)), list(first.guess(1)), list(second.guess(2))) == ([9, 8], [9], [])
    assert all(type(token) is int for token in first.guess(2))
    assert second.sampling() == Sampling(temperature=0.0, prompt_length=5)
    noise, key = stage.keys.noise_of("a", SamplingParams(temperature=0.5))
    assert first.sampling() == Sampling(0.5, 7, 1.0, 0.0, noise, key, 4)
    assert stage.listener.most == 3


def test_without_a_search_nothing_is_suggested() -> None:
    stage = Stage(guesses=False)
    stage.propose([[3], [8]], tokens_in=2)
    assert [list(row.guess(4)) for row in stage.listener.rows] == [[], []]


def test_nothing_is_suggested_beyond_the_targets_longest_text() -> None:
    stage = Stage(max_model_len=9)
    stage.propose([[3], [8]], tokens_in=2)
    assert list(stage.listener.rows[0].guess(4)) == [9]
    stage.runner.max_model_len = 8
    assert list(stage.listener.rows[0].guess(4)) == []


@pytest.mark.parametrize(("tokens_in", "decodes"), [(6, True), (7, False), (130, False)])
def test_a_step_with_prefill_in_it_says_so(tokens_in: int, decodes: bool) -> None:
    """Two rows and four drafts are 6 tokens: what is beyond them is prefill."""
    stage = Stage()
    stage.propose([[2, 3], [8]], tokens_in=tokens_in, a=3, b=1)
    assert stage.listener.tokens_in == (tokens_in if decodes else None)


def test_the_q_is_the_speculators() -> None:
    found: Any = Stage().drafter.proposals("a", 2)
    assert found == ("a", 2)


# ---- requests that come and go --------------------------------------------------------------------------------------


def test_under_a_grammar_drafts_are_certain() -> None:
    """The scheduler keeps those that it allows: which drafts are verified then depends on what they are."""
    stage = Stage()
    asked = SamplingParams(temperature=0.5, structured_outputs=StructuredOutputsParams(regex="a+"))
    stage.runner.requests["a"].sampling_params = asked
    assert stage.drafter.proposals("a", 3) is None
    assert stage.drafter.proposals("b", 3) is not None


def test_profiling_and_warm_up_reach_nobody() -> None:
    stage = Stage()
    stage.drafter.dummy_run(8)
    stage.drafter.initialize_attn_backend(None, None)
    stage.drafter.initialize_cudagraph_keys(None)
    assert (stage.listener.arrived, stage.listener.left, stage.listener.rows) == ([], [], [])


def test_the_drafter_of_another_rank_drafts_nothing_and_waits_for_nobody() -> None:
    stage = Stage()
    stage.runner.drafter, stage.runner.speculative_config.disable_padded_drafter_batch = vllms_own(), False
    silent = SilentDrafter()
    install(stage.runner, silent)
    assert stage.runner.drafter is silent
    assert stage.runner.speculative_config.disable_padded_drafter_batch, "else the runner calls it before bookkeeping"
    silent.load_model(None)
    silent.begin_step(SimpleNamespace())
    assert stage.propose([[2, 3], []], tokens_in=5, a=3) == [[], []]
    assert silent.proposals("a", 3) is None
    assert not stage.listener.ready


def test_a_request_that_goes_on_with_new_input_has_a_new_key() -> None:
    """Its outputs are counted from 0 again: with the old key it would have the old noise again."""
    stage = Stage()
    sampled = SamplingParams(temperature=0.5)
    stage.begin(("c", [1, 2], sampled))
    stage.begin(("c", [1, 2, 3], sampled))
    first, second = (sampling.seed for _, _, sampling in stage.listener.arrived)
    assert first != second


def test_a_new_request_comes_with_its_prompt_and_how_it_samples() -> None:
    stage = Stage()
    params = SamplingParams(temperature=0.75, top_k=5, top_p=0.5, min_p=0.25, seed=2**63 + 1)
    stage.begin(("x", [1, 2, 3], params))
    assert stage.listener.arrived == [
        ("x", [1, 2, 3], Sampling(0.75, 5, 0.5, 0.25, Noise.SEED, 2**63 + 1 - 2**64, 3)),
    ]


def test_a_key_is_the_same_at_admission_and_when_it_is_learnt_anew() -> None:
    stage = Stage()
    stage.begin(("a", [1, 2, 3, 9], SamplingParams(temperature=0.5, top_k=7)))
    stage.propose([[3], [8]], tokens_in=2)
    assert stage.listener.rows[0].sampling() == stage.listener.arrived[0][2]
    assert stage.listener.arrived[0][2].coupled


def test_a_request_that_left_leaves_no_key() -> None:
    stage = Stage()
    stage.begin(("x", [1], SamplingParams(temperature=1.0)))
    assert len(stage.keys.integers("x", 0, 2)) == 2
    stage.begin(left=["x"])
    assert stage.keys.integers("x", 0, 2) == []
    assert stage.listener.left == ["x"]


def test_an_id_that_ends_and_comes_again_in_one_step_has_a_new_key() -> None:
    stage = Stage()
    stage.begin(("x", [1], SamplingParams(temperature=1.0)))
    stage.begin(("x", [1], SamplingParams(temperature=1.0)), left=["x"])
    first, second = (sampling.seed for _, _, sampling in stage.listener.arrived)
    assert first != second
    assert stage.keys.integers("x", 0, 1) != []


@pytest.mark.parametrize(("prompt", "params"), [(None, SamplingParams()), ([1, 2], None)])
def test_a_request_without_tokens_or_without_sampling_is_left_out(
    prompt: list[int] | None, params: SamplingParams | None
) -> None:
    """The first has embeddings for a prompt, the second is for pooling."""
    stage = Stage()
    stage.begin(("x", prompt, params))
    assert stage.listener.arrived == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0.0), Sampling(prompt_length=2)),
        (SamplingParams(temperature=2.0), Sampling(2.0, prompt_length=2)),
        (SamplingParams(temperature=1.0, top_k=-1), Sampling(1.0, prompt_length=2)),
        (SamplingParams(temperature=1.0, top_k=0), Sampling(1.0, prompt_length=2)),
        (SamplingParams(temperature=1.0, top_k=2**40), Sampling(1.0, 2**31 - 1, prompt_length=2)),
    ],
)
def test_sampling_crosses_within_what_the_wire_holds(params: SamplingParams, expected: Sampling) -> None:
    stage = Stage(keyed=False)
    stage.begin(("x", [1, 2], params))
    assert stage.listener.arrived[0][2] == expected


def test_a_temperature_that_vllm_lets_through_nowadays_no_more_is_cut_to_what_a_float32_holds() -> None:
    stage, params = Stage(keyed=False), SamplingParams(temperature=1.0)
    params.temperature = 1e39
    stage.begin(("x", [1], params))
    assert stage.listener.arrived[0][2].temperature == 1e6


def test_a_draft_side_that_takes_the_likeliest_token_is_not_asked_for_a_q() -> None:
    """It has none: one that tells one would bias the sampled text."""
    assert Stage(has_q=False).drafter.proposals("a", 2) is None


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["begin_step", "propose", "proposals"])
def test_an_error_of_the_drafting_ends_that_alone_and_no_pass_waits_for_its_end(where: str) -> None:
    stage = Stage()
    listener = stage.listener
    listener.page.set(counters.DRAFT_UP, 1)
    listener.fails_at = where
    found: list[Any] = []
    for _ in range(2):
        stage.begin(("c", [1, 2], SamplingParams(temperature=0.5)), left=["d"])
        found += [stage.propose([[2, 3], [8]], tokens_in=5, a=3), stage.drafter.proposals("a", 2)]
    empty: list[list[int]] = [[], []]
    assert found[2:] == [empty, None]
    assert found[:2] == {"begin_step": [empty, None], "propose": [empty, None], "proposals": [[[2], [1]], None]}[where]
    assert listener.calls.count(where) == 1, "it is asked no more"
    assert listener.calls[-1] == where
    assert listener.page.value(counters.DRAFT_LEFT_OFF) == 1
    assert not listener.closed
    assert listener.page.value(counters.DRAFT_UP) == 1
    listener.may_close.set()
    stage.drafter.wait_until_given_up()
    assert len(listener.closed) == 1
    assert listener.closed != [threading.main_thread()]
    assert listener.page.value(counters.DRAFT_UP) == 0


def test_a_runner_that_is_not_as_it_was_costs_the_drafts_alone() -> None:
    stage = Stage()
    del stage.runner.requests["b"]
    stage.listener.may_close.set()
    assert stage.propose([[2, 3], [8]], tokens_in=5, a=3) == [[], []]
    stage.drafter.wait_until_given_up()
    assert stage.listener.closed


def test_after_an_error_keys_come_and_go_as_before() -> None:
    """What a request without a seed samples hangs on them, with drafts or without."""
    stage, params = Stage(), SamplingParams(temperature=1.0)
    stage.listener.fails_at = "begin_step"
    stage.listener.may_close.set()
    for name in "xy":
        stage.begin((name, [1], params))
    assert len(stage.keys.integers("y", 0, 2)) == 2
    stage.begin(left=["x", "y"])
    assert stage.keys.integers("y", 0, 2) == []


def test_where_nothing_failed_nothing_is_waited_for() -> None:
    Stage().drafter.wait_until_given_up()
    SilentDrafter().wait_until_given_up()
