"""The seam to Model Runner V2 (vLLM 0.32 and 0.33, `v1/worker/gpu/model_runner.py`).

V2 is asynchronous: when `propose` runs, the host has scheduled the next step already, and the outcomes of this one are
tensors that nobody waits for. So `propose` only enqueues: it gathers the outcomes of the step by request slot, has the
draft exchange them for drafts, and returns valid token ids for every row. How many of them are real stays in `ready`,
from where the sampler of the next step reads it (`marked_sampler.py`).

What the host does know comes with the scheduler's output: who came, who left, and the tokens of a prompt. The slot of a
request is the runner's own; it is given anew when a request comes back after a preemption.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator, DraftModelSpeculator

from vllm_saguaro.device_messages import DeviceDraft, DeviceOutcomes
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.messages import Noise, Sampling
from vllm_saguaro.vllm_hooks.closing import Closing
from vllm_saguaro.vllm_hooks.device_counters import DeviceCounters

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_saguaro.vllm_hooks.device_ranks import Ranks

logger = init_logger(f"vllm.{__name__}")

_MOST_TOP_K = 2**31 - 1


class SaguaroSpeculator(BaseSpeculator):
    """Hands the outcomes of each step to a `DeviceDraft`, and its drafts to the runner.

    K drafts a round, R request slots, B rows of a step, V tokens of the target's vocabulary. Without a draft (none
    given yet, or given up after an error) every draft is filler, and requests go on one token a step.

    Public state: `ready` [R] int32 on the device, how many of a slot's drafts under verification are real;
    `draft_logits` [R, K, V] float32 or None, see `DeviceDraft.logits_into`; it is float32 whatever the model's dtype,
    because the verifier must be given the very q that was drawn from, and None where drafts have no q that anybody asks
    for (coupled and certain ones); `ranks`, where the target has several.
    """

    supports_mm_inputs = False

    def __init__(
        self,
        req_states: RequestState,
        num_speculative_tokens: int,
        longest: int,
        with_q: bool,
        counters: DeviceCounters | None = None,
    ) -> None:
        """`longest`: tokens of a prompt that the draft may hold at most; `with_q`: drafts may be drawn from a q."""
        self._do = operations_for(req_states.device)
        slots, device, vocab_size = req_states.max_num_reqs, req_states.device, req_states.vocab_size
        self.draft_logits = torch.zeros(slots, num_speculative_tokens, vocab_size, device=device) if with_q else None
        self.ready = torch.zeros(slots, dtype=torch.int32, device=device)
        self._draft: DeviceDraft | None = None
        self._req_states = req_states
        self._most_drafts = num_speculative_tokens
        self._last_token = vocab_size - 1
        self._longest = longest
        self._counters = counters
        self._counts = torch.zeros(4, dtype=torch.int64, device=device) if counters is None else counters.counts
        self._tokens = torch.zeros(slots, num_speculative_tokens, dtype=torch.int64, device=device)
        # What is known of a slot's request, on the device: how many drafts it may have, and whether they are certain.
        self._most = torch.zeros(slots, dtype=torch.int32, device=device)
        self._certain = torch.zeros(slots, dtype=torch.bool, device=device)
        self._sampled: np.ndarray = np.zeros(slots, dtype=bool)
        """Whether a slot's request has a temperature; on the host."""
        self._slots: dict[str, int] = {}
        """The slot of each request that the draft has."""
        self._may_capture = False
        self._seeds: np.ndarray | None = None
        """Of each slot's request, on the host, where they decide the target's tokens."""
        self._closing = Closing()
        self.ranks: Ranks | None = None

    def know_noise(self, seeds: np.ndarray) -> None:
        """The target's tokens are decided by the seeds [R] int64 that the runner gives its slots (a view of them)."""
        self._seeds = seeds

    # ---- who comes and goes ------------------------------------------------------------------------------------------

    def attach(self, draft: DeviceDraft) -> None:
        """From now on the drafts come from here."""
        self._draft = draft

    def warm_up(self) -> None:
        """A row that got no token, in the first slot, which is nobody's: kernels are compiled now, not in a step."""
        count, device = len(self.ready), self.ready.device
        slots, none = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        newest = torch.zeros(count, 1, dtype=torch.int64, device=device)
        lengths, temperature = (torch.zeros(count, dtype=t, device=device) for t in (torch.int32, torch.float32))
        by_slot = newest, lengths, temperature, self._certain
        where, accepted, *_ = self._do.gather_outcomes(slots, none, none, *by_slot)
        tokens = self._tokens[:1]
        self._do.book_drafts(
            *(tokens, none, where, accepted, self._most, self._last_token), *(tokens, self.ready, self._counts)
        )

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before the runner takes a step in: let go of those whose slots it is about to free."""
        leaving = [*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())]
        # A request that goes on with new input comes like a new one.
        leaving += [new.req_id for new in scheduler_output.scheduled_new_reqs]
        for request_id in leaving:
            slot = self._slots.pop(request_id, None)
            if slot is not None and self._draft is not None:
                try:
                    self._draft.release(slot, request_id)
                except Exception:
                    self._give_up()

    def follow_step(self, scheduler_output: SchedulerOutput) -> None:
        """After the runner has taken a step in, and before it samples: tell the draft who came, and into which slot."""
        for new in scheduler_output.scheduled_new_reqs:
            slot = self._req_states.req_id_to_index.get(new.req_id)
            if slot is not None:
                self._take_in(slot, new)

    def _take_in(self, slot: int, new: NewRequestData) -> None:
        params, token_ids = new.sampling_params, new.prefill_token_ids
        seed = None if self._seeds is None else int(self._seeds[slot])
        sampling = _sampling(params, new.prompt_len, seed)
        structured = params is not None and params.structured_outputs is not None
        self._sampled[slot] = not sampling.greedy
        # Under structured output the grammar ends some speculations early, by what the drafts are: no q is right for
        # those, but certain drafts are exact under any selection, and so are coupled ones. So where drafts would have a
        # q the draft side takes the request for greedy.
        structured &= self._seeds is None
        self._certain[slot].fill_(structured)
        self.ready[slot].fill_(0)
        # A text of embeddings has no tokens to draft from.
        fits = bool(token_ids) and len(token_ids) < self._longest and new.prompt_embeds is None
        if fits and self._draft is not None:
            try:
                known = Sampling(prompt_length=sampling.prompt_length) if structured else sampling
                self._draft.admit(slot, new.req_id, token_ids, known)
                self._slots[new.req_id] = slot
            except Exception:
                self._give_up()
        self._most[slot].fill_(self._most_drafts if new.req_id in self._slots else 0)

    # ---- the runner's side -------------------------------------------------------------------------------------------

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """Drafts for every row: [B, K] int64, valid ids, a buffer of ours that the runner may write into.

        Also in a step that hands over none of them (`num_speculative_tokens` 0): the draft has to hear each outcome.
        """
        rows = input_batch.num_reqs
        tokens = self._tokens[:rows]
        if dummy_run:
            return tokens
        by_slot = last_sampled, self._req_states.total_len.gpu, temperature, self._certain
        gathered = self._do.gather_outcomes(input_batch.idx_mapping, num_sampled, num_rejected, *by_slot)
        outcomes = DeviceOutcomes(*gathered, input_batch.req_ids, input_batch.idx_mapping_np)
        booked = False
        if self._draft is not None and _gives_a_token(input_batch):
            booked = self._exchange(self._draft, outcomes, tokens)
        if not booked:
            tokens.copy_(outcomes.bonus.unsqueeze(-1).expand_as(tokens))
            self.ready.index_fill_(0, outcomes.slots, 0)
        if self.ranks is not None:
            self.ranks.share(tokens)
        return tokens

    def _exchange(self, draft: DeviceDraft, outcomes: DeviceOutcomes, tokens: Tensor) -> bool:
        """Write the drafts for these outcomes to `tokens` [B, K], and to `ready` how many are real; or the draft fails.

        Where some row has a temperature the q of all rows is written, too.
        """
        try:
            drafts = draft.exchange(outcomes)
            # A kernel would leave rows that it is not given as they were.
            assert drafts.tokens.shape == tokens.shape
            assert drafts.ready.shape == outcomes.slots.shape
            if self.draft_logits is not None and self._sampled[outcomes.slots_on_host].any():
                draft.logits_into(outcomes, drafts, self.draft_logits)
                if self._counters is not None:
                    self._counters.drew(draft.sampling_c)
            self._do.book_drafts(
                *(drafts.tokens, drafts.ready, outcomes.slots, outcomes.accepted, self._most, self._last_token),
                *(tokens, self.ready, self._counts),
            )
        except Exception:
            self._give_up()
            return False
        if self._counters is not None:
            self._counters.counted()
            self._counters.drafted(self._most_drafts, draft.branches)
        return True

    def _give_up(self) -> None:
        """The draft has failed: requests go on without drafts, and nobody waits for its end.

        To be called where an exception is being handled.
        """
        logger.exception("Saguaro: the draft failed; the target goes on without drafts until the engine is restarted.")
        draft, self._draft = self._draft, None
        self._slots.clear()
        if self._counters is not None:
            self._counters.gave_up()
        if draft is not None:
            self._closing.begin(functools.partial(self._close, draft))

    def _close(self, draft: DeviceDraft) -> None:
        """Close a draft that was given up, in a thread: that has no device of its own, and would take the first."""
        try:
            with torch.cuda.device(self.ready.device) if self.ready.is_cuda else contextlib.nullcontext():
                draft.close()
        finally:
            if self._counters is not None:
                self._counters.ended()

    def close(self) -> None:
        """End the draft; harmless when there is none."""
        self._closing.wait()
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.close()

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """The runner's graphs are its own; the draft captures its own ones."""

    def cache_is_there(self) -> None:
        """The target's KV cache has been made: the next capture is the one that counts."""
        self._may_capture = True

    def capture(self) -> None:
        """After the target's graphs, once. vLLM's trial captures, which only measure memory, come before the cache."""
        if self._may_capture and self._draft is not None:
            self._may_capture = False
            try:
                self._draft.capture()
            except Exception:
                self._give_up()
                self._closing.wait()  # no request is there yet, and vLLM may capture more


def _gives_a_token(input_batch: InputBatch) -> bool:
    """Whether any row of a step gets a token: all but those in the midst of a prompt, which the host knows."""
    read = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
    return bool((~input_batch.is_prefilling_np | (read >= input_batch.prefill_len_np)).any())


def _sampling(params: SamplingParams | None, prompt_length: int, seed: int | None) -> Sampling:
    """How a request samples. `seed`: of its noise, where that is known. Beyond a point a temperature is infinite."""
    if params is None:
        return Sampling(prompt_length=prompt_length)
    return Sampling(
        temperature=min(float(params.temperature or 0.0), 1e6),
        top_k=min(max(params.top_k, 0), _MOST_TOP_K),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        noise=Noise.UNKNOWN if seed is None else Noise.POSITION,
        seed=seed or 0,
        prompt_length=prompt_length,
    )


def install(runner: Any, speculator: SaguaroSpeculator) -> None:
    """Put ours where a runner that has loaded nothing yet has vLLM's own speculator."""
    if not isinstance(runner.speculator, DraftModelSpeculator):
        raise RuntimeError(f"vllm_saguaro: expected vLLM's own draft_model speculator, found {type(runner.speculator)}")
    runner.speculator = speculator
