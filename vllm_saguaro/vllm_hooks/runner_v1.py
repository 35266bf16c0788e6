"""The seam to Model Runner V1 (vLLM 0.32 and 0.33, `v1/worker/gpu_model_runner.py`; the CPU runner is a subclass).

V1 in synchronous mode is a host-side runner: after bookkeeping it calls `propose_draft_token_ids` with the accepted
tokens as lists, row i belonging to `input_batch.req_ids[i]`, and takes ragged lists of drafts back; an empty list
costs nothing. That mode is reached with `disable_padded_drafter_batch`, which the constructor of vLLM's own
`DraftModelProposer` refuses: it is set on the worker's configuration after the runner has been made.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_saguaro import counters
from vllm_saguaro.algorithm import ngram
from vllm_saguaro.messages import GREEDY_BELOW, Proposals, Sampling
from vllm_saguaro.speculator import Speculator, Verified
from vllm_saguaro.vllm_hooks.closing import Closing
from vllm_saguaro.vllm_hooks.known_noise import RequestKeys

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")

_MOST_TOP_K = 2**31 - 1


class SilentDrafter(DraftModelProposer):
    """Stands where the runner expects its own drafter, and drafts nothing: that of all ranks but the first.

    Which drafts are verified comes to every rank with the scheduler's output. It is a `DraftModelProposer` only because
    the runner asserts so in several places; it has no model, no KV cache and no graphs in this process, so what the
    runner does to those is nothing here.
    """

    supports_mm_inputs = False
    model = None

    def __init__(self) -> None:
        self.draft_attn_groups: list[Any] = []

    def load_model(self, target_model: Any) -> None:
        """No draft in this process."""

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Nobody to tell."""

    def propose_draft_token_ids(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]], *unused: Any
    ) -> list[list[int]]:
        """Takes the place of the runner's method of this name. vLLM asks the first rank alone for the drafts."""
        return [[] for _ in sampled_token_ids]

    def proposals(self, request_id: str, count: int) -> Proposals | None:
        """No q is known here."""
        return None

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Profiling and warm-up runs of the target do not concern the draft."""

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """No attention in this process."""

    def initialize_cudagraph_keys(self, *args: Any, **kwargs: Any) -> None:
        """No graphs in this process."""

    def wait_until_given_up(self) -> None:
        """Nothing to wait for."""


class SaguaroDrafter(SilentDrafter):
    """The drafter of a target's only or first rank: asks the speculator.

    Once that has raised an error it is asked no more: requests go on without drafts.
    """

    def __init__(
        self,
        speculator: Speculator,
        runner: GPUModelRunner,
        keys: RequestKeys,
        guesses: bool,
        has_q: bool = True,
    ) -> None:
        """`guesses`: whether a request's own text may stand in after a miss. `has_q`: whether a q may be asked for.

        A draft side that takes the likeliest token at every temperature has none, and one that tells one lies.
        """
        super().__init__()
        self.speculator = speculator
        self.runner = runner
        self.keys = keys
        self._guesses = guesses
        self._has_q = has_q
        self._given_up = False
        self._closing = Closing()

    def load_model(self, target_model: Any) -> None:
        """The draft has been loading elsewhere while the target loaded here: wait for it."""
        self.speculator.channel.wait_until_ready()

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before the target's forward: tell the draft side who came and who left."""
        # A request that goes on with new input comes like a new one, and its noise must not begin again.
        for request_id in (
            *scheduler_output.finished_req_ids,
            *(n.req_id for n in scheduler_output.scheduled_new_reqs),
        ):
            self.keys.forget(request_id)
        arrived = [
            (new.req_id, new.prompt_token_ids, self._asked(new.req_id, new.sampling_params, len(new.prompt_token_ids)))
            for new in scheduler_output.scheduled_new_reqs
            if new.prompt_token_ids is not None and new.sampling_params is not None
        ]
        if self._given_up:
            return
        try:
            self.speculator.begin_step(arrived, list(scheduler_output.finished_req_ids))
        except Exception:
            self._give_up()

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        *unused: Any,
    ) -> list[list[int]]:
        """Takes the place of the runner's method of this name (see the module's first lines)."""
        if not self._given_up:
            try:
                return self._propose(scheduler_output, sampled_token_ids)
            except Exception:
                self._give_up()
        return [[] for _ in sampled_token_ids]

    def _propose(self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        batch, in_pass = self.runner.input_batch, scheduler_output.scheduled_spec_decode_tokens
        rows = [
            Verified(
                request_id,
                sampled,
                len(in_pass.get(request_id, ())),
                int(batch.num_tokens_no_spec[row]),
                functools.partial(self._tokens, row),
                functools.partial(self._sampling, request_id),
                functools.partial(self._suggest, row),
                self._is_greedy(request_id),
            )
            for row, (request_id, sampled) in enumerate(zip(batch.req_ids, sampled_token_ids, strict=True))
        ]
        tokens_in = scheduler_output.total_num_scheduled_tokens
        only_decodes = tokens_in == sum(1 + row.verified for row in rows)
        return self.speculator.propose(
            rows, scheduler_output.num_spec_tokens_to_schedule, tokens_in if only_decodes else None
        )

    def proposals(self, request_id: str, count: int) -> Proposals | None:
        """The q of a request's first `count` drafts under verification; None: certain.

        Under structured output the scheduler keeps only the drafts that the grammar allows, so that which drafts are
        verified depends on what they are: no q is right for those, but certain drafts are exact under any selection.
        """
        params = self.runner.requests[request_id].sampling_params
        if not self._has_q or params is None or params.structured_outputs is not None or self._given_up:
            return None
        try:
            return self.speculator.proposals(request_id, count)
        except Exception:
            self._give_up()
            return None

    def _give_up(self) -> None:
        """Ask for no more drafts, and let nobody wait for the draft's end. Where an exception is being handled."""
        logger.exception("Saguaro: drafting failed; the target goes on without drafts until the engine is restarted.")
        self._given_up = True
        self.speculator.page.set(counters.DRAFT_LEFT_OFF, 1)
        self._closing.begin(self._close)

    def _close(self) -> None:
        try:
            self.speculator.channel.close()
        finally:
            self.speculator.page.set(counters.DRAFT_UP, 0)

    def wait_until_given_up(self) -> None:
        """Until the draft has ended, where drafting has failed: nothing else may close it meanwhile."""
        self._closing.wait()

    def _tokens(self, row: int) -> list[int]:
        batch = self.runner.input_batch
        return batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]].tolist()

    def _suggest(self, row: int, most: int) -> list[int]:
        if not self._guesses:
            return []
        batch = self.runner.input_batch
        length = batch.num_tokens_no_spec[row]
        most = min(most, self.runner.max_model_len - length)
        return ngram.guess(batch.token_ids_cpu[row, :length], most).tolist()

    def _sampling(self, request_id: str) -> Sampling:
        request = self.runner.requests[request_id]
        return self._asked(request_id, request.sampling_params, request.num_prompt_tokens)

    def _is_greedy(self, request_id: str) -> bool:
        params = self.runner.requests[request_id].sampling_params
        return params is None or (params.temperature or 0.0) < GREEDY_BELOW

    def _asked(self, request_id: str, params: SamplingParams | None, prompt_length: int) -> Sampling:
        """How a request samples. It crosses in float32, and beyond a point a temperature is as good as infinite."""
        if params is None:
            return Sampling()
        noise, seed = self.keys.noise_of(request_id, params)
        return Sampling(
            temperature=min(float(params.temperature or 0.0), 1e6),
            top_k=min(max(params.top_k, 0), _MOST_TOP_K),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            noise=noise,
            seed=seed,
            prompt_length=prompt_length,
        )


def install(runner: GPUModelRunner, drafter: SilentDrafter) -> None:
    """Put our drafter into a runner that has been made and has loaded nothing yet."""
    if not isinstance(runner.drafter, DraftModelProposer) or isinstance(runner.drafter, SilentDrafter):
        raise RuntimeError(f"vllm_saguaro: expected vLLM's own draft_model drafter, found {type(runner.drafter)}")
    runner.drafter = drafter
    runner.propose_draft_token_ids = drafter.propose_draft_token_ids
    runner.speculative_config.disable_padded_drafter_batch = True
    # Past this length the runner drafts token 0 for the whole batch. The speculator knows each request's own limit.
    runner.effective_drafter_max_model_len = sys.maxsize
